"""What a run will cost: memory per block, and seconds. Estimates from shapes alone."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from prunus.engine.divergence import TOKENS
from prunus.engine.linear import LinearJob
from prunus.engine.memory import BlockCost
from prunus.engine.retouch import RetouchJob
from prunus.machine import matmul_rate
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.recipe import Recipe
from prunus.statistics import statistics_bytes

__all__ = ["Workload", "block_cost", "estimate_seconds", "hidden_size"]


class Workload(Protocol):
    """What has to be known of a run to tell its cost."""

    recipe: Recipe
    source: CheckpointSource | ModuleSource
    skeleton: Skeleton
    linear_job: LinearJob
    device: torch.device
    dtype: torch.dtype
    batch: int
    targets: list[list[str]]

    @property
    def windows(self) -> int:
        """Calibration windows of this process."""

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration windows go through the model at all."""

    @property
    def carries_dense(self) -> bool:
        """Whether the dense model's hidden states go along."""

    @property
    def retouch_job(self) -> RetouchJob | None:
        """How blocks are matched to the dense ones, if they are."""

    def fits_lockstep(self, index: int) -> bool:
        """Whether all batches can pause in block `index`."""


def estimate_seconds(work: Workload) -> float:
    """Matrix products of all forward passes at the rate measured now, plus 40 % for the rest."""
    tokens, retouch_job = work.windows * work.recipe.seqlen, work.retouch_job
    flops = 0.0
    for index in range(len(work.skeleton)):
        weights = sum(rows * columns for rows, columns in (x.shape for x in work.skeleton.linears(index)))
        passes = (1 if work.recipe.propagate == "linear" else 2) if work.needs_inputs else 0
        if passes == 1 and not work.fits_lockstep(index):
            passes = 5
        passes += work.carries_dense
        if work.recipe.permute:
            passes += 1  # behind the reordered block, and trials of one batch before it
        if retouch_job is not None:
            passes += 1 + 3 * retouch_job.passes
        flops += 2.0 * weights * tokens * passes
        if work.linear_job.method.needs == "gram":
            columns = [x.shape for x in work.skeleton.linears(index) if x.name in work.targets[index]]
            # A Gram per distinct input (about 4 of 7 linears), its factor, and what is done to the weights.
            products = work.linear_job.method.products
            flops += sum(
                (1.2 + work.linear_job.method.needs_drift) * tokens * c * c
                + c**3
                + 2.0 * products * r * c * c
                for r, c in columns
            )
    if retouch_job is not None:
        # The last block is matched by its logits: the head forwards twice, and once back.
        flops += (
            6.0
            * _head_rows(work.skeleton.model)
            * hidden_size(work.skeleton.model)
            * tokens
            * retouch_job.passes
        )
    return round(1.4 * flops / matmul_rate(work.device, work.dtype), 1)


def block_cost(work: Workload, index: int) -> BlockCost:
    """Bytes for one block; see `BlockCost`. The widths are those of the block's linears."""
    linears = work.skeleton.linears(index)
    size = work.dtype.itemsize
    tokens = work.windows * work.recipe.seqlen
    hidden = hidden_size(work.skeleton.model)
    widest = max(max(linear.shape) for linear in linears)
    largest = max(rows * columns for rows, columns in (linear.shape for linear in linears))
    stored = work.source.block_nbytes(index)
    computed = sum(p.numel() for p in work.skeleton.blocks[index].parameters()) * size
    inputs = max(linear.shape[1] for linear in linears)
    batch_tokens = min(work.batch * work.recipe.seqlen, tokens)
    needs = work.linear_job.method.needs
    # float32 weight, score, sorted copy and the rounded result; solvers hold six matrices of its size, and some
    # of the Gram's, which others invert in float64.
    working = 14 * largest + statistics_bytes(inputs, needs, work.linear_job.method.needs_drift)
    if needs == "gram":
        working += 24 * largest + 24 * inputs**2
    if needs == "gram" and work.recipe.propagate == "block":
        working += sum(statistics_bytes(linear.shape[1], needs) for linear in linears)
    streams = work.needs_inputs * (2 if work.carries_dense else 1)
    transient = work.needs_inputs * batch_tokens * (6 * hidden + 3 * widest) * size
    if work.linear_job.method.needs_drift:
        working += (36 if work.linear_job.method.holds_out else 12) * inputs**2
    if work.recipe.match_blocks:
        # Trained in float32: weights, gradients, two moments, a copy of where they began and one of the best; every
        # activation waits for the way back, attention's among them.
        numbers = computed // size
        working += 24 * numbers
        heads = int(getattr(work.source.config.get_text_config(), "num_attention_heads", 1) or 1)
        transient += 4 * batch_tokens * (24 * hidden + 8 * widest + 4 * heads * work.recipe.seqlen)
        if index == len(work.skeleton) - 1:
            # The head, and of some tokens the logits on either side, with what is made of them; see `divergence`.
            rows = _head_rows(work.skeleton.model)
            transient += rows * hidden * size + 24 * TOKENS * work.batch * rows
    return BlockCost(
        weights=2 * stored + computed * (2 if work.carries_dense else 1),
        working=working,
        hidden=streams * tokens * hidden * size,
        paused=streams * tokens * (4 * hidden + widest) * size,
        transient=transient,
    )


def _head_rows(model: nn.Module) -> int:
    """Entries of the vocabulary."""
    head: Any = model.get_output_embeddings() or model.get_input_embeddings()  # type: ignore[operator]
    return int(head.weight.shape[0])


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[1])
