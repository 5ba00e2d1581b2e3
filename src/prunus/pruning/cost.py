"""What a run will cost: memory per block, and seconds. Estimates from shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from prunus.hardware.memory import matmul_rate
from prunus.methods.statistics import statistics_bytes
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.pruning.block.linear import LinearSettings
from prunus.pruning.recipe import Recipe
from prunus.pruning.reconstruction.kl_loss import TOKENS
from prunus.pruning.reconstruction.reconstruct_block import in_front_of_head
from prunus.pruning.reconstruction.schedule import (
    VALIDATION_STRIDE,
    ReconstructionSchedule,
    ReconstructionSettings,
    default_schedule,
    trained,
)
from prunus.pruning.sensitivity import PROBE_STEPS, PROBE_TOKENS, PROBE_WINDOWS, layers_of

__all__ = ["Workload", "block_cost", "estimate_seconds"]


@dataclass(frozen=True)
class BlockCost:
    """What one block asks of memory, in bytes.

    Attributes:
        weights: the block in the dtype of the computation, its stored form, and the pruned copies that wait
            to be written.
        working: temporaries of the largest linear while it is pruned, and its input statistics.
        hidden: hidden states of all windows between blocks.
        paused: what the windows that stand at a linear hold beside that: residual, normed input,
            queries, keys and values, and the widest activation (four hidden states and one width of the widest
            linear per token).
        transient: one batch's forward pass, in whatever way the windows are walked through the block.
    """

    weights: int
    working: int
    hidden: int
    paused: int
    transient: int

    @property
    def lockstep_in_memory(self) -> int:
        return self.weights + self.working + self.hidden + self.paused + self.transient

    @property
    def lockstep_spilled(self) -> int:
        return self.weights + self.working + self.paused + self.transient

    @property
    def replay_in_memory(self) -> int:
        return self.weights + self.working + self.hidden + self.transient

    @property
    def least(self) -> int:
        """Hidden states on disk, one batch at a time."""
        return self.weights + self.working + self.transient


class Workload(Protocol):
    """What has to be known of a run to tell its cost."""

    recipe: Recipe
    source: CheckpointSource | ModuleSource
    skeleton: Skeleton
    linear_settings: LinearSettings
    device: torch.device
    dtype: torch.dtype
    batch: int
    selected: list[list[str]]

    @property
    def windows(self) -> int:
        """Calibration windows of this process."""

    @property
    def batches(self) -> int:
        """Of calibration windows, of all processes."""

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration windows go through the model at all."""

    @property
    def runs_dense_stream(self) -> bool:
        """Whether the dense model's hidden states go along."""

    def uses_dense_target(self, in_features: int) -> bool:
        """Whether a linear with so many inputs is told what the dense model gives it."""

    @property
    def drift_stride(self) -> int:
        """One batch in so many shows what linears are given in the dense model."""

    @property
    def reconstruction(self) -> ReconstructionSettings | None:
        """How blocks are matched to the dense ones, if they are."""

    def fits_lockstep(self, index: int) -> bool:
        """Whether all batches can pause in block `index`."""


def estimate_seconds(work: Workload) -> float:
    """Matrix products of all forward passes at the rate measured now, plus 40 % for the rest."""
    reconstruction = work.reconstruction
    dense = 1 / work.drift_stride if work.runs_dense_stream else 0.0
    flops = 0.0
    for index in range(len(work.skeleton)):
        tokens = work.windows * work.skeleton.window_shape(index, work.recipe.seqlen)[0]
        experts, share = _routing(work, index)
        sizes = {
            x.name: x.shape[0] * x.shape[1] * share(x.name) for x in work.skeleton.linears(index)
        }
        weights = sum(sizes.values())
        passes: float = (1 if work.recipe.propagate == "linear" else 2) if work.needs_inputs else 0
        if passes == 1 and not work.fits_lockstep(index):
            passes = (
                5 + experts
            )  # each is two groups of linears, and half the block runs for one on average
        passes += dense
        if work.recipe.permute:
            passes += 1  # behind the reordered block, and trials of one batch before it
        if reconstruction is not None and reconstruction.takes(index, len(work.skeleton)):
            learn = trained(list(sizes), work.linear_settings.method.updates_weights)
            learnt = sum(sizes[name] for name in learn)
            passes += (
                1
                + 3 * dense * _token_passes(work, _default_schedule(work, index)) * learnt / weights
            )
        flops += 2.0 * weights * tokens * passes
        if work.linear_settings.method.needs == "gram":
            chosen = [x for x in work.skeleton.linears(index) if x.name in work.selected[index]]
            columns = [(*x.shape, share(x.name)) for x in chosen]
            # A Gram per distinct input (about 4 of 7 linears), its factor, and what is done to the weights.
            products = work.linear_settings.method.products
            flops += sum(
                (1.2 + dense * work.uses_dense_target(c)) * tokens * reached * c * c
                + c**3
                + 2.0 * products * r * c * c
                for r, c, reached in columns
            )
    if work.recipe.allocation == "search":
        flops += _search_flops(work)
    last = len(work.skeleton) - 1
    if reconstruction is not None and in_front_of_head(work.skeleton, last):
        # The last block is matched by its logits: for some tokens the head forwards twice, and once back.
        in_window, hidden = work.skeleton.window_shape(last, work.recipe.seqlen)
        own = _default_schedule(work, last)
        seen = work.windows * in_window * dense * _token_passes(work, own) / own.logit_stride
        flops += (4.0 / VALIDATION_STRIDE + 6.0) * _head_rows(work.skeleton) * hidden * seen
    return round(1.4 * flops / matmul_rate(work.device, work.dtype), 1)


def _token_passes(work: Workload, own: ReconstructionSchedule) -> float:
    """How often matching looks at every token of a block at its `own` pace, if what it trains takes tokens apart."""
    assert work.reconstruction is not None
    return (work.reconstruction.passes or own.passes) / own.token_stride


def _default_schedule(work: Workload, index: int) -> ReconstructionSchedule:
    tokens, hidden = work.skeleton.window_shape(index, work.recipe.seqlen)
    by_logits = in_front_of_head(work.skeleton, index)
    along = -(-work.batches // work.drift_stride)
    return default_schedule(
        work.batch * tokens, hidden, work.linear_settings.method.updates_weights, along, by_logits
    )


def _search_flops(work: Workload) -> float:
    """Every layer's trials run through all blocks from its own on, half of them on average."""
    blocks = range(len(work.skeleton))
    weights = sum(x.shape[0] * x.shape[1] for index in blocks for x in work.skeleton.linears(index))
    layers = len(layers_of(work.selected, work.recipe.allocation_by))
    tokens = PROBE_WINDOWS * min(PROBE_TOKENS, work.recipe.seqlen)
    return 2.0 * weights * tokens * (1 + 0.5 * layers * len(PROBE_STEPS))


def _routing(work: Workload, index: int) -> tuple[int, Callable[[str], float]]:
    """Experts of a block, and the share of all tokens that reaches a linear: of experts, what each gets on average."""
    fused = work.skeleton.fused(index)
    if not fused:
        return 0, lambda _name: 1.0
    config = work.source.config.get_text_config()
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
    chosen = next((k for name in names if isinstance(k := getattr(config, name, None), int)), 1)
    owners = {
        member.removesuffix(".weight"): each.shape[0] for each in fused for member in each.members
    }
    return max(
        owners.values()
    ), lambda name: min(1.0, chosen / owners[name]) if name in owners else 1.0


def block_cost(work: Workload, index: int) -> BlockCost:
    """Bytes for one block; see `BlockCost`. The widths are those of the block's linears."""
    linears = work.skeleton.linears(index)
    size = work.dtype.itemsize
    in_window, hidden = work.skeleton.window_shape(index, work.recipe.seqlen)
    tokens = work.windows * in_window
    widest = max(max(linear.shape) for linear in linears)
    largest = max(rows * columns for rows, columns in (linear.shape for linear in linears))
    stored = work.source.block_nbytes(index)
    computed = sum(p.numel() for p in work.skeleton.blocks[index].parameters()) * size
    inputs = max(linear.shape[1] for linear in linears)
    batch_tokens = min(work.batch * in_window, tokens)
    needs = work.linear_settings.method.needs
    # float32 weight, score, sorted copy and the rounded result; solvers hold six matrices of its size, and some
    # of the Gram's, which others invert in float64.
    working = 14 * largest + statistics_bytes(inputs, needs)
    if needs == "gram":
        working += 24 * largest + 24 * inputs**2
    if needs == "gram" and work.recipe.propagate == "block":
        working += sum(statistics_bytes(linear.shape[1], needs) for linear in linears)
    streams = work.needs_inputs * (2 if work.runs_dense_stream else 1)
    transient = work.needs_inputs * batch_tokens * (6 * hidden + 3 * widest) * size
    aimed = max(
        (linear.shape[1] for linear in linears if work.uses_dense_target(linear.shape[1])),
        default=0,
    )
    working += (40 if work.linear_settings.method.needs_held_out else 20) * aimed**2
    if work.reconstruction is not None and work.reconstruction.takes(index, len(work.skeleton)):
        # Trained in float32: weights, gradients, two moments, a copy of where they began and one of the best; every
        # activation waits for the way back, attention's among them.
        numbers = computed // size
        working += 24 * numbers
        heads = int(getattr(work.source.config.get_text_config(), "num_attention_heads", 1) or 1)
        transient += 4 * batch_tokens * (24 * hidden + 8 * widest + 4 * heads * in_window)
        if in_front_of_head(work.skeleton, index):
            # The head, and of some tokens the logits on either side, with what is made of them; see `kl_divergence`.
            rows = _head_rows(work.skeleton)
            transient += rows * hidden * size + 24 * TOKENS * work.batch * rows
    return BlockCost(
        weights=2 * stored + computed * (2 if work.runs_dense_stream else 1),
        working=working,
        hidden=streams * tokens * hidden * size,
        paused=streams * tokens * (4 * hidden + widest) * size,
        transient=transient,
    )


def _head_rows(skeleton: Skeleton) -> int:
    """Entries of the vocabulary."""
    head: Any = skeleton.model.get_output_embeddings() or skeleton.model.get_input_embeddings()
    return int(head.weight.shape[0])
