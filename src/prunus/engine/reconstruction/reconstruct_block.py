"""The reconstruction of one block inside a run: where its inputs and targets are, and who has them.

    inputs    hidden states of the pruned model before the block    (pruned stream)
    targets   hidden states of the dense model after the block     (dense stream)

`train.py` trains. This file finds the inputs and targets on every rank, runs only the suffix of the
block where that is possible, and decides what is trained and for how long.

Outline: `BlockReconstructor` serves a run, `BlockReconstruction` one block.
`ReconstructionBatches` brings the batches of all ranks to every rank. The schedule is at the end.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from prunus.distributed import SINGLE_PROCESS, own_part, ranks, set_location, using
from prunus.engine.linear_plan import ReconstructionSettings
from prunus.engine.linear_record import ReconstructionRecord
from prunus.engine.reconstruction.cached_suffix import CachedSuffix, find_suffix, suffix_module
from prunus.engine.reconstruction.output_loss import (
    LOGIT_STRIDE,
    OutputLoss,
    divergence_loss,
    logits_of,
    relative_error,
)
from prunus.engine.reconstruction.train import BlockBatches, TrainOptions, train_block
from prunus.engine.run_record import Walk
from prunus.model.stream import KeptStates, Stream

#: From the number of a batch to the block's output.
Forward = Callable[[int], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class BlockReconstructor:
    """What the reconstruction of any block of a run needs.

    Attributes:
        settings: What the run says about it.
        stream: Hidden states of the pruned model, before the block.
        dense: Hidden states of the dense model, of some of these batches.
        numbers: Per batch of `dense` on this rank, its number in `stream`.
        splits: Whether the ranks split the windows of a training step; see `splits_windows`.
    """

    settings: ReconstructionSettings
    stream: Stream
    dense: Stream
    numbers: Sequence[int]
    splits: bool

    def begin(
        self, index: int, block: nn.Module, linears: Sequence[str], updated: bool, walk: Walk
    ) -> BlockReconstruction | None:
        """Prepare the training of a block, before the windows walk through it.

        Args:
            index: Position of the block.
            block: The block with its weights in place.
            linears: Relative names of the linears that are changed.
            updated: The method updates the surviving weights; see `linears_to_train`.
            walk: How the windows go through the block.

        Returns:
            None if the run does not train this block, or if there is nothing to train.
        """
        if not linears or not self.settings.applies_to(index, len(self.stream.skeleton)):
            return None
        # With several ranks every rank would have to cache the batches of all ranks, so they
        # recompute instead. So does replay, which exists to save memory.
        caches_suffix = walk == "lockstep" and ranks().size == 1
        trained = linears_to_train(linears, updated)
        return BlockReconstruction(self, index, block, trained, caches_suffix)


@dataclass
class BlockReconstruction:
    """The reconstruction of one block, from the walk of its windows to its trained weights.

    Attributes:
        shared: What the blocks of a run have in common.
        index: Position of the block.
        block: The block.
        trained: Relative names of the linears that are trained.
        caches_suffix: The walk records what reaches the block's suffix, if it has one.
        suffix: The suffix with its inputs, cached during the walk; None before the walk, and if
            there is none to cache.
    """

    shared: BlockReconstructor
    index: int
    block: nn.Module
    trained: Sequence[str]
    caches_suffix: bool
    suffix: CachedSuffix | None = None

    @contextlib.contextmanager
    def recording(self, forward: Forward) -> Iterator[Forward]:
        """Yield a forward pass for the walk that caches what reaches the suffix of the block.

        It is `forward` itself, batch -> output of the block, if nothing can be cached.
        """
        self.find_suffix(forward)
        if self.suffix is None:
            yield forward
            return
        with self.suffix.recording() as recording:
            yield recording

    def find_suffix(self, forward: Forward) -> None:
        """Find the suffix of the block, whose inputs are cached, unless they may not be."""
        if self.caches_suffix:
            self.suffix = find_suffix(self.block, self.trained, forward, 0)

    def run(
        self,
        stored: Mapping[str, torch.Tensor],
        pruned: Mapping[str, torch.Tensor],
        targets: KeptStates | None = None,
    ) -> tuple[dict[str, torch.Tensor], ReconstructionRecord | None]:
        """Train the pruned block; its module ends with the weights with which it began.

        Args:
            stored: The block's dense tensors by relative name, as stored.
            pruned: Its pruned weights by relative name, as stored. Their zeros are the masks.
            targets: The dense block's outputs; None if they have replaced its inputs.

        Returns:
            The trained tensors by relative name, in dtype and orientation of `stored`, and the
            record for the manifest. Nothing and None for a block without a suffix that should
            learn before it is changed: it does not pay there.

        Raises:
            ValueError: Outputs or targets are not finite; the message names the block.
        """
        shared = self.shared
        skeleton = shared.stream.skeleton
        name = skeleton.block_name(self.index)
        set_location(f"{name}, reconstruction")
        inputs = self._batches(shared.stream.states, shared.numbers)
        dense = shared.dense.states if targets is None else targets
        dense_batches = self._batches(dense, range(len(shared.numbers)))
        run = shared.stream.call(self.index, self.block)

        def forward(batch: int) -> torch.Tensor:
            return run(x) if len(x := inputs.get(batch)) else x

        # A suffix that was cached during the walk numbers all batches of the pruned stream; a new
        # one numbers the batches that are trained on.
        suffix = self.suffix
        numbers = shared.numbers
        if not self.caches_suffix:
            suffix = self._uncached_suffix(run, inputs, forward)
            numbers = range(len(inputs))
        if shared.settings.before and suffix is None:
            return {}, None

        def outputs(batch: int, tokens: slice) -> torch.Tensor:
            return forward(batch) if suffix is None else suffix(numbers[batch], tokens)

        by_token = suffix is not None and suffix.by_token
        # While batches wait in a block, the head cannot run.
        by_logits = skeleton.is_in_front_of_head(self.index) and not shared.settings.before
        # Hidden states are (windows, tokens, hidden), or images as grids (images, channels, height,
        # width).
        shape = inputs.shape(0)
        hidden = shape[-1] if len(shape) == 3 else shape[1]
        tokens = math.prod(shape) // hidden
        settings = shared.settings
        options = default_schedule(tokens, hidden, by_token, len(inputs), by_logits)
        options = replace(
            options,
            epochs=settings.epochs or options.epochs,
            dtype=settings.dtype,
            learning_rate=options.learning_rate * (_RATE_BEFORE if settings.before else 1.0),
        )
        keys = [f"{linear}.weight" for linear in self.trained]
        masks = self._masks({key: pruned[key] for key in keys}, stored)
        batches = BlockBatches(outputs, dense_batches.get, *split_batches(len(inputs)))
        started = time.perf_counter()
        with self._loss(by_logits, options.logit_stride) as loss:
            try:
                # Ranks that do not split windows all train with the same ones, each for itself.
                with using(ranks() if shared.splits else SINGLE_PROCESS):
                    result = train_block(self.block, batches, masks, options, loss)
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
            step_seconds=round(result.step_seconds, 4),
            validation_seconds=round(result.validation_seconds, 4),
        )
        return trained, record

    def _masks(
        self, pruned: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Relative name -> bool mask of what is trained: weights that survive, and biases.

        `pruned` are the weights of the trained linears, `stored` all tensors of the block.
        """
        device = next(self.block.parameters()).device
        masks = {key: (weight != 0).to(device) for key, weight in pruned.items()}
        for key, parameter in self.block.named_parameters():
            # Norms are left alone: the weights next to them can learn the same scale.
            linear = key.removesuffix(".bias")
            if linear != key and f"{linear}.weight" in pruned and key in stored:
                masks[key] = torch.ones(parameter.shape, dtype=torch.bool, device=device)
        return masks

    def _batches(self, states: KeptStates, numbers: Sequence[int]) -> ReconstructionBatches:
        """Those batches, by number on this rank, that are trained on, of all ranks."""
        device = self.shared.stream.device
        return ReconstructionBatches(states, numbers, self.shared.splits, device)

    def _uncached_suffix(
        self,
        run: Callable[[torch.Tensor], torch.Tensor],
        inputs: ReconstructionBatches,
        forward: Forward,
    ) -> CachedSuffix | None:
        """The suffix that holds the trained linears, whose inputs are computed in every step.

        All ranks use it or none does. Ranks without windows of the first batch cannot try it.

        Args:
            run: Hidden states -> output of the block.
            inputs: The batches that are trained on.
            forward: Number of one of these batches -> output of the block.
        """
        module = suffix_module(self.block, self.trained)
        if module is None:
            return None
        x = inputs.get(0)
        suffix = (
            find_suffix(self.block, self.trained, lambda _batch: run(x), 0, keep=False)
            if len(x)
            else None
        )
        # A vote: whether this rank could try; whether there is a suffix; whether it is by token.
        vote = [len(x) > 0, suffix is not None, suffix is not None and suffix.by_token]
        votes = [other for other in ranks().gather_ints(vote) if other[0]]
        if not all(other[1] for other in votes):
            return None
        return CachedSuffix(module, forward, keep=False, by_token=all(other[2] for other in votes))

    @contextlib.contextmanager
    def _loss(self, by_logits: bool, logit_stride: int) -> Iterator[OutputLoss]:
        """The relative error of outputs, or the KL divergence of logits with the head in place."""
        if not by_logits:
            yield relative_error
            return
        # Ranks that do not split the windows of a step hold the same tensors, so they can split
        # the tokens that are compared instead.
        with logits_of(self.shared.stream) as logits:
            yield divergence_loss(logits, not self.shared.splits, logit_stride)


def splits_windows(batches: Sequence[torch.Tensor], device: torch.device) -> bool:
    """Whether the ranks split the windows of one training step.

    They do unless no batch can be split. On CUDA they always do: gradients need not be the same
    twice there, so even the gradient of a single window comes from one rank for all.

    Args:
        batches: Token ids of the batches of all ranks.
        device: Where gradients are computed.
    """
    return device.type == "cuda" or any(len(ids) > 1 for ids in batches)


def step_parts(batches: Sequence[torch.Tensor], splits: bool) -> list[torch.Tensor]:
    """As many windows of each batch, as token ids, as this rank gets of it in a training step.

    The stream must see how the model calls its blocks with as many windows. Only their number
    matters, so these are the first ones of the batch.

    Args:
        batches: Token ids of the batches of all ranks.
        splits: Whether the ranks split the windows of a step; see `splits_windows`.
    """
    return [ids[: len(own_part(ids))] if splits else ids for ids in batches]


class ReconstructionBatches:
    """The batches of all ranks as one sequence, in the order of ranks.

    The recipe decides which windows form a step, so that one process and many take the same steps.
    So the owner of a batch sends it to all ranks, which takes far less time than the gradients of a
    block. Each rank computes with a part of the windows, and the gradients are summed. A batch of a
    single window cannot be split: all ranks compute the same with it.

    The constructor and `get` synchronize: every rank calls them, in the same order.

    Args:
        states: Hidden states of this rank.
        chosen: Positions in `states` of the batches that are used.
        splits: Whether the ranks split the windows of a step; see `splits_windows`.
        device: Where `get` puts the batches.
    """

    def __init__(
        self,
        states: KeptStates,
        chosen: Sequence[int],
        splits: bool,
        device: torch.device,
    ) -> None:
        self._states = states
        self._chosen = chosen
        # The ranks share batches also while each of them trains for itself.
        self._ranks = ranks()
        self._splits = splits
        self._device = device
        # A rank must allocate a batch before it receives it, so all ranks learn shapes and dtypes.
        layouts = [states.layout(batch) for batch in chosen]
        text = json.dumps(
            [[list(shape), str(dtype).removeprefix("torch.")] for shape, dtype in layouts]
        )
        by_rank = [json.loads(part) for part in self._ranks.gather_text(text)]
        # Per batch of all ranks: [shape, name of the dtype].
        self._layouts = [layout for part in by_rank for layout in part]
        # The rank that has it; and the number of this rank's first one.
        self._owners = [rank for rank, part in enumerate(by_rank) for _ in part]
        self._first = sum(map(len, by_rank[: self._ranks.rank]))

    def __len__(self) -> int:
        """The number of batches of all ranks."""
        return len(self._owners)

    def shape(self, batch: int) -> tuple[int, ...]:
        """The shape of a batch with all its windows."""
        return tuple(self._layouts[batch][0])

    def get(self, batch: int) -> torch.Tensor:
        """This rank's windows of a batch, hidden states on the device; there may be none."""
        owner, (shape, dtype) = self._owners[batch], self._layouts[batch]
        if owner == self._ranks.rank:
            # Receivers get contiguous memory. Kernels may round differently on other strides, so
            # the owner must use the same layout.
            whole = self._states.get(self._chosen[batch - self._first]).contiguous()
        else:
            whole = torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)
        self._ranks.broadcast(whole, owner)
        return own_part(whole) if self._splits else whole


# --- the schedule: what is trained after a block is pruned, on which batches, and how long ---
#
# The surviving weights and biases of a pruned block learn the outputs of the dense block. The masks
# stay as they are.

#: One batch in this many is a validation batch: it is not trained on, and chooses the result.
VALIDATION_STRIDE = 16

# Many small steps lower the error more than few large ones on the same tokens. So a step uses about
# this many tokens of its batch if the trained part treats tokens independently. It uses more if
# five epochs would otherwise not see all of them.
_TOKENS_PER_STEP = 256
_MIN_EPOCHS, _MAX_EPOCHS = 3, 5

# Peak learning rate relative to the RMS of the weights, and the hidden size it was measured at.
_RATE, _RATE_WIDTH = 7e-3, 576

# The share of these rates if weights learn before they are rounded: they have little to repair.
_RATE_BEFORE = 0.2

# With the loss on logits, a token takes about ten times as long, so a step compares only one token
# in `LOGIT_STRIDE` of those above. Fewer tokens make noisier gradients, which need a lower rate.
# The number of steps is limited too. 240 steps are what eight epochs over 30 windows of 1024
# tokens take; they compare half of the tokens, each once. With half as many of either, perplexity
# was one per cent higher.
_LOGIT_STEPS, _LOGIT_RATE, _MAX_LOGIT_STRIDE = 240, 2e-3, 28


def default_schedule(
    tokens: int, hidden: int, by_token: bool, batches: int, by_logits: bool = False
) -> TrainOptions:
    """The schedule for a block if the user sets nothing.

    An epoch costs `1 / token_stride` of a pass over all tokens.

    The rate falls with the square root of the width. Relative to the RMS of the weights, 0.007 is
    best for SmolLM2-135M (hidden size 576) and about 0.003 for Qwen2.5-Coder-1.5B (1536). Both
    optima are flat within a factor of 1.5. The dtype is left at float32.

    Args:
        tokens: Number of tokens per batch.
        hidden: Size of the block's hidden states.
        by_token: The trained part of the block can run on some tokens of a batch.
        batches: Number of batches, for training and validation together.
        by_logits: The loss compares logits, as it does for the last block.

    >>> default_schedule(tokens=1024, hidden=576, by_token=True, batches=32)
    TrainOptions(epochs=5, token_stride=4, learning_rate=0.007, logit_stride=1, dtype=torch.float32)
    """
    fewer, most = (LOGIT_STRIDE, _MAX_LOGIT_STRIDE) if by_logits else (1, _MAX_EPOCHS)
    stride = min(most, max(1, fewer * tokens // _TOKENS_PER_STEP)) if by_token else 1
    # Wider blocks learn at a lower rate; narrower ones are not measured, so theirs is not raised.
    width_factor = min(1.0, (_RATE_WIDTH / hidden) ** 0.5)
    if not by_logits:
        # An epoch sees one token in `stride`, so twice as many epochs see every token twice.
        epochs = min(_MAX_EPOCHS, max(_MIN_EPOCHS, 2 * stride))
        return TrainOptions(epochs, stride, _RATE * width_factor)
    # Half as many epochs as the stride see every second token once.
    enough = round(_LOGIT_STEPS / max(1, len(split_batches(batches)[0])))
    epochs = max(1, min(max(_MIN_EPOCHS, stride // 2), enough))
    # A block that must run on all tokens leaves the choice of tokens to the loss.
    logit_stride = 1 if by_token else LOGIT_STRIDE
    return TrainOptions(epochs, stride, _LOGIT_RATE * width_factor, logit_stride)


def split_batches(batches: int) -> tuple[range, range]:
    """The numbers of the training batches and of the validation batches, which come last.

    `batches` is their number on all ranks, at least 2.

    >>> split_batches(32), split_batches(2)
    ((range(0, 30), range(30, 32)), (range(0, 1), range(1, 2)))
    """
    first = batches - max(1, batches // VALIDATION_STRIDE)
    return range(first), range(first, batches)


def linears_to_train(linears: Sequence[str], updated: bool) -> list[str]:
    """Those of a block's pruned linears that are trained.

    After a method that updates weights, these are the ones after attention: that takes half of
    the time for nearly all of the gain. A method that only masks leaves the error of attention as
    it is, so then all are trained. All are trained as well if attention holds all of them.

    Args:
        linears: Relative names in the order in which they run.
        updated: The pruning method updates the surviving weights.

    >>> linears_to_train(["self_attn.q_proj", "mlp.up_proj"], updated=True)
    ['mlp.up_proj']
    >>> linears_to_train(["self_attn.q_proj", "mlp.up_proj"], updated=False)
    ['self_attn.q_proj', 'mlp.up_proj']
    """
    # Attention is taken to be the submodule that holds the first linear.
    first = linears[0].partition(".")[0]
    after = [name for name in linears if updated and name.partition(".")[0] != first]
    return after or list(linears)
