"""The reconstruction of one block inside a run: where its inputs and targets are, and who has them.

    inputs    hidden states of the pruned model before the block    (pruned stream)
    targets   hidden states of the dense model after the block     (dense stream)

`schedule.py` decides what is trained and for how long, `train.py` trains. This file finds the
inputs and targets on every rank, and runs only the suffix of the block where that is possible.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.model.skeleton import Skeleton
from prunus.model.stream import HiddenStates, Stream
from prunus.pruning.manifest import ReconstructionRecord
from prunus.pruning.reconstruction.cached_suffix import CachedSuffix, find_suffix, suffix_module
from prunus.pruning.reconstruction.output_loss import (
    CHUNK_TOKENS,
    OutputLoss,
    kl_divergence,
    logits_of,
    relative_error,
)
from prunus.pruning.reconstruction.schedule import (
    ReconstructionSettings,
    default_schedule,
    split_batches,
)
from prunus.pruning.reconstruction.train import BlockBatches, TrainOptions, train_block
from prunus.runs.job import RunJob
from prunus.runs.record import Walk

Forward = Callable[[int], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class BlockReconstructor:
    """What the reconstruction of any block of a run needs."""

    settings: ReconstructionSettings
    stream: Stream
    dense: Stream
    numbers: Sequence[int]  #: per batch of `dense`, its number in `stream`
    counts: Sequence[int]  #: per rank, how many batches `dense` has
    ranks: Ranks
    split: Ranks  #: ranks that split the windows of a training step; see `step_ranks`

    def begin(
        self, index: int, block: nn.Module, trained: Sequence[str], walk: Walk
    ) -> BlockReconstruction | None:
        """Prepare the training of a block before its walk; None if nothing would be trained."""
        if not trained or not self.settings.applies_to(index, len(self.stream.skeleton)):
            return None
        # With several ranks every rank would have to cache the batches of all ranks, so they
        # recompute instead. So does replay, which exists to save memory.
        caches_suffix = walk == "lockstep" and self.ranks.size == 1
        return BlockReconstruction(self, index, block, trained, caches_suffix)


@dataclass
class BlockReconstruction:
    """The reconstruction of one block, from the walk of its windows to its trained weights."""

    shared: BlockReconstructor
    index: int
    block: nn.Module
    trained: Sequence[str]
    caches_suffix: bool
    suffix: CachedSuffix | None = None

    @contextlib.contextmanager
    def recording(self, forward: Forward) -> Iterator[Forward]:
        """Yield a forward, batch -> output, that caches what reaches the suffix if it can."""
        if self.caches_suffix:
            self.suffix = find_suffix(self.block, self.trained, forward, 0)
        if self.suffix is None:
            yield forward
            return
        with self.suffix.recording() as recording:
            yield recording

    def run(
        self, stored: Mapping[str, torch.Tensor], pruned: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], ReconstructionRecord]:
        """Train the block, then reset it; the trained tensors, as stored, and the record."""
        shared, skeleton = self.shared, self.shared.stream.skeleton
        name = skeleton.block_name(self.index)
        shared.ranks.set_location(f"{name}, reconstruction")
        inputs = self._batches(shared.stream, shared.numbers)
        targets = self._batches(shared.dense, range(len(shared.numbers)))
        run = shared.stream.call(self.index, self.block)

        def forward(batch: int) -> torch.Tensor:
            return run(x) if len(x := inputs.get(batch)) else x

        # A suffix that was cached during the walk numbers all batches of the pruned stream; a new
        # one numbers the batches that are trained on.
        suffix, numbers = self.suffix, shared.numbers
        if not self.caches_suffix:
            suffix, numbers = self._uncached_suffix(run, inputs, forward), range(len(inputs))

        def outputs(batch: int, tokens: slice) -> torch.Tensor:
            return forward(batch) if suffix is None else suffix(numbers[batch], tokens)

        by_token = suffix is not None and suffix.by_token
        by_logits = in_front_of_head(skeleton, self.index)
        # Hidden states are (windows, tokens, hidden), or images as grids (images, channels, height,
        # width).
        shape = inputs.shape(0)
        hidden = shape[-1] if len(shape) == 3 else shape[1]
        tokens = math.prod(shape) // hidden
        schedule = default_schedule(tokens, hidden, by_token, len(inputs), by_logits)
        settings, keys = shared.settings, [f"{linear}.weight" for linear in self.trained]
        options = TrainOptions(
            learning_rate=schedule.learning_rate,
            epochs=settings.epochs or schedule.epochs,
            token_stride=schedule.token_stride,
            dtype=settings.dtype,
        )
        masks = self._masks({key: pruned[key] for key in keys}, stored)
        batches = BlockBatches(outputs, targets.get, *split_batches(len(inputs)))
        started = time.perf_counter()
        with self._loss(by_logits, schedule.logit_stride) as loss:
            try:
                result = train_block(self.block, batches, masks, options, loss, shared.split)
            except ValueError as fault:
                raise ValueError(f"{name}: {fault}") from fault
        trained = {
            key: weight.to(stored[key].dtype).to(stored[key].device)
            for key, weight in result.weights.items()
        }
        record = ReconstructionRecord(
            error_before=result.error_before,
            error_after=result.error_after,
            measure="logits" if by_logits else "outputs",
            steps=result.steps,
            stopped=result.stopped,
            dtype=str(settings.dtype).removeprefix("torch."),
            seconds=round(time.perf_counter() - started, 3),
        )
        return trained, record

    def _masks(
        self, pruned: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Relative name -> bool mask of what is trained: kept weights of linears, their biases."""
        device = next(self.block.parameters()).device
        masks = {key: (weight != 0).to(device) for key, weight in pruned.items()}
        for key, parameter in self.block.named_parameters():
            # Norms are left alone: the weights next to them can learn the same scale.
            linear = key.removesuffix(".bias")
            if linear != key and f"{linear}.weight" in pruned and key in stored:
                masks[key] = torch.ones(parameter.shape, dtype=torch.bool, device=device)
        return masks

    def _batches(self, stream: Stream, numbers: Sequence[int]) -> ReconstructionBatches:
        shared = self.shared
        return ReconstructionBatches(
            stream.states, numbers, shared.counts, shared.ranks, shared.split, stream.device
        )

    def _uncached_suffix(
        self,
        run: Callable[[torch.Tensor], torch.Tensor],
        inputs: ReconstructionBatches,
        forward: Forward,
    ) -> CachedSuffix | None:
        """The suffix that holds the trained linears, whose inputs are computed in every step.

        All ranks use it or none does. Ranks without windows of the first batch cannot try it.
        """
        module = suffix_module(self.block, self.trained)
        if module is None:
            return None
        x = inputs.get(0)
        found = (
            find_suffix(self.block, self.trained, lambda _batch: run(x), 0, keep=False)
            if len(x)
            else None
        )
        own = [len(x) > 0, found is not None, found is not None and found.by_token]
        votes = [vote for vote in self.shared.ranks.gather_ints(own) if vote[0]]
        if not all(vote[1] for vote in votes):
            return None
        return CachedSuffix(module, forward, keep=False, by_token=all(vote[2] for vote in votes))

    @contextlib.contextmanager
    def _loss(self, by_logits: bool, logit_stride: int) -> Iterator[OutputLoss]:
        """The relative error of outputs, or the KL divergence of logits with the head in place."""
        if not by_logits:
            yield relative_error
            return
        # Ranks that do not split the windows of a step hold the same tensors, so they can split
        # the tokens that are compared instead.
        shared = self.shared
        ranks = shared.ranks if shared.split is SINGLE_PROCESS else SINGLE_PROCESS
        with logits_of(shared.stream) as logits:
            yield kl_divergence(logits, ranks, logit_stride)


def in_front_of_head(skeleton: Skeleton, index: int) -> bool:
    """Whether only the final norm and the head follow block `index`, so it can compare logits."""
    return index == len(skeleton) - 1 and skeleton.kind.is_causal


def activation_bytes(
    tokens: int, window_tokens: int, hidden: int, widest: int, heads: int, itemsize: int
) -> int:
    """Bytes of the activations of a block that a backward pass needs.

    Per token these are about 24 hidden states (the residual stream before and after both parts,
    two norms with their statistics, queries, keys, values, outputs, and the gradients of as many),
    eight activations of the widest linear (gate, up, their product and its gradients), and four
    rows of attention scores per head: before and after the softmax, with gradients.
    """
    return itemsize * tokens * (24 * hidden + 8 * widest + 4 * heads * window_tokens)


def training_bytes(job: RunJob, index: int) -> tuple[int, int]:
    """Bytes of the training of block `index`: those that stay, and those of one batch."""
    linears = job.skeleton.linears(index)
    parameters = sum(p.numel() for p in job.skeleton.blocks[index].parameters())
    window_tokens, hidden = job.skeleton.window_shape(index, job.recipe.seqlen)
    tokens = min(job.batch, job.windows) * window_tokens
    widest = max(max(linear.shape) for linear in linears)
    heads = int(getattr(job.source.config.get_text_config(), "num_attention_heads", 1) or 1)
    moves = activation_bytes(tokens, window_tokens, hidden, widest, heads, itemsize=4)
    if in_front_of_head(job.skeleton, index):
        # The head, and for some tokens the logits of both models; see `kl_divergence`.
        vocabulary = job.skeleton.vocabulary
        moves += vocabulary * hidden * job.dtype.itemsize
        moves += 24 * CHUNK_TOKENS * job.batch * vocabulary
    # Seven float32 tensors per parameter: the weight, its mask, its gradient, Adam's two moments, a
    # copy of the start and a copy of the best so far.
    return 7 * 4 * parameters, moves


def step_ranks(ranks: Ranks, windows: int, device: torch.device) -> Ranks:
    """Return the ranks that split the windows of one training step.

    These are all ranks, or only this one if a batch cannot be split. On CUDA they are always all
    ranks: gradients need not be the same twice there, so even the gradient of a single window comes
    from one rank for all.
    """
    return ranks if windows > 1 or device.type == "cuda" else SINGLE_PROCESS


def step_parts(batches: Sequence[torch.Tensor], split: Ranks) -> list[torch.Tensor]:
    """What a rank may get of each batch: blocks must know how they are called with as many."""
    return [ids[: len(split.own_range(len(ids)))] for ids in batches]


class ReconstructionBatches:
    """The batches of all ranks as one sequence, in the order of ranks.

    The recipe decides which windows form a step, so that one process and many take the same steps.
    So the owner of a batch sends it to all ranks, which takes far less time than the gradients of a
    block. Each rank computes with a part of the windows, and the gradients are summed. A batch of a
    single window cannot be split: all ranks compute the same with it.

    The constructor and `get` synchronize: every rank calls them, in the same order.
    """

    def __init__(
        self,
        states: HiddenStates,
        chosen: Sequence[int],
        counts: Sequence[int],
        ranks: Ranks,
        split: Ranks,
        device: torch.device,
    ) -> None:
        self._states, self._chosen = states, chosen
        self._ranks, self._split, self._device = ranks, split, device
        self._owners = [rank for rank, count in enumerate(counts) for _ in range(count)]
        self._first = sum(counts[: ranks.rank])
        # A rank must allocate a batch before it receives it, so all ranks learn shapes and dtypes.
        layouts = [states.layout(batch) for batch in chosen]
        own = json.dumps(
            [[list(shape), str(dtype).removeprefix("torch.")] for shape, dtype in layouts]
        )
        self._layouts = [layout for text in ranks.gather_text(own) for layout in json.loads(text)]

    def __len__(self) -> int:
        return len(self._owners)

    def shape(self, batch: int) -> tuple[int, ...]:
        return tuple(self._layouts[batch][0])

    def get(self, batch: int) -> torch.Tensor:
        """Return this rank's windows of a batch; there may be none."""
        owner, (shape, dtype) = self._owners[batch], self._layouts[batch]
        if owner == self._ranks.rank:
            # Receivers get contiguous memory. Kernels may round differently on other strides, so
            # the owner must use the same layout.
            whole = self._states.get(self._chosen[batch - self._first]).contiguous()
        else:
            whole = torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)
        self._ranks.broadcast(whole, owner)
        own = self._split.own_range(len(whole))
        return whole[own.start : own.stop]
