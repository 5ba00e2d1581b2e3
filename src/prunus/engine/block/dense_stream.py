"""The dense stream: the hidden states of the dense model, next to those of the pruned one.

It runs only for methods with targets from the dense model and for block reconstruction. Every
dense block runs in a copy of its own, so that pruning cannot touch it:

    pruned stream  X̂ ──► block k, its linears pruned on the way ──► X̂ of block k + 1
    dense stream   X  ──► copy of the dense block k             ──► X  of block k + 1

The drift X − X̂ of a linear's inputs is small and needs fewer tokens than the Gram matrix. So
where possible only one batch in `stride` runs through the dense model.

Shape suffixes: T tokens, I inputs of a linear.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prunus.engine.block.hooks import input_hooks
from prunus.methods.dense_targets import MAX_DRIFT_STRIDE
from prunus.methods.statistics import InputStatistics
from prunus.model.calls import StopForward
from prunus.model.linears import Linear, find_linears
from prunus.model.skeleton import Skeleton
from prunus.model.source import WeightSource
from prunus.model.stream import HiddenStates, KeptStates, Stream

# Tokens per input feature that are enough to measure a linear's drift; see `drift_stride_for`.
_TOKENS_PER_FEATURE = 2.5


class DenseStream:
    """The calibration windows on their way through the dense model.

    Call `embed` first, then `copy_block` or `propagate` once per block in order, and close `stream`
    at the end.

    Args:
        skeleton: The model without weights. Both streams share it.
        source: The dense weights.
        device: Where the copies of the blocks run.
        stride: One batch in `stride` runs through the dense model. Batches are counted over all
            processes, from the first one on.

    Attributes:
        stream: The hidden states of the dense model before the next block.
        dense_number: Number of a batch in the pruned stream of this rank -> its number in `stream`.
            Batches that do not run through the dense model are missing.
    """

    def __init__(
        self, skeleton: Skeleton, source: WeightSource, device: torch.device, stride: int = 1
    ) -> None:
        self.stream = Stream(skeleton, source, device)
        self._stride = stride
        self.dense_number: dict[int, int] = {}

    def embed(
        self,
        batches: Sequence[torch.Tensor],
        spill_to: Path | None,
        on_device: bool = True,
        first_batch: int = 0,
    ) -> None:
        """Run what precedes the blocks; see `Stream.embed`.

        Args:
            batches: Token ids of all batches of this rank, also of those that are left out here.
            spill_to: Folder for a file of hidden states; None to keep them in memory.
            on_device: Keep hidden states on the device between blocks.
            first_batch: Number of this rank's first batch among those of all processes.
        """
        dense_batches = [
            batch for batch in range(len(batches)) if (first_batch + batch) % self._stride == 0
        ]
        self.dense_number = {batch: number for number, batch in enumerate(dense_batches)}
        self.stream.embed([batches[batch] for batch in dense_batches], spill_to, on_device)

    def propagate(self, index: int) -> None:
        """Take all batches through dense block `index`, whose inputs nobody needs."""
        if len(self.stream):
            self.stream.propagate(index, self.stream.source.block(index))

    def copy_block(
        self, index: int, stored: Mapping[str, torch.Tensor], names: Sequence[str], cache: bool
    ) -> DenseBlockInputs:
        """Copy dense block `index`, to read its inputs while the original is pruned.

        Args:
            index: Position of the block.
            stored: Its dense tensors by relative name.
            names: Linears whose inputs will be read, relative to the block.
            cache: Run every batch once and keep its inputs; see `DenseBlockInputs`.
        """
        block = self.stream.skeleton.fill(index, stored, self.stream.device, duplicate=True)
        linears = [linear for linear in find_linears(block) if linear.name in names]
        return DenseBlockInputs(self.stream, self.dense_number, index, block, linears, cache)


class DenseBlockInputs:
    """The inputs of the linears of one dense block, batch by batch; see `DenseStream.copy_block`.

    Args:
        stream: The hidden states of the dense model before the block. They stay there until the
            batch has run for the last time, and are then replaced by the block's outputs.
        dense_number: Number of a batch in the pruned stream -> its number in `stream`.
        index: Position of the block.
        block: A copy of the block with its dense weights.
        linears: Linears of the copy whose inputs can be read.
        cache: Run every batch once and keep the inputs of all `linears`, for lockstep, which keeps
            all batches in memory anyway. Otherwise every call of `get` runs the batch again.
    """

    def __init__(
        self,
        stream: Stream,
        dense_number: Mapping[int, int],
        index: int,
        block: torch.nn.Module,
        linears: list[Linear],
        cache: bool,
    ) -> None:
        self._stream = stream
        self._dense_number = dense_number
        self._forward = stream.forward(index, block)
        self._linears = {linear.name: linear for linear in linears}
        self._caches = cache
        # Number in the dense stream -> name of a linear -> its input (…, in).
        self._cache: dict[int, dict[str, torch.Tensor]] = {}

    def get(self, name: str, batch: int, tokens: int) -> torch.Tensor | None:
        """The input X_TI (tokens, in) of a dense linear; may be asked for once per batch.

        Args:
            name: Name of the linear, relative to the block.
            batch: Number of the batch in the pruned stream.
            tokens: Number of rows that reach the linear in the pruned model.

        Returns:
            None if the batch does not run through the dense model, or if other tokens reach the
            linear there. Row t is certainly the same token in both models only if all tokens of the
            batch reach the linear in both. An expert may get other tokens in each model.
        """
        if batch not in self._dense_number:
            return None
        number = self._dense_number[batch]
        shape, _ = self._stream.states.layout(number)
        # Images as grids (images, channels, height, width) are never routed: all rows are there.
        all_tokens = tokens if len(shape) == 4 else shape[:-1].numel()
        if tokens != all_tokens:
            return None
        x = self._cached(number, name) if self._caches else self._recomputed(number, name)
        if x is None or x.shape[:-1].numel() != all_tokens:
            return None
        return x.reshape(all_tokens, x.shape[-1])

    def accumulate(
        self, statistics: InputStatistics, linear: Linear, batch: int, x: torch.Tensor
    ) -> None:
        """Add a linear's inputs (…, in) to its statistics, with those in the dense model.

        The latter are added if it has a drift. This is an `Accumulate` of a walk.
        """
        has_target = statistics.drift_II is not None
        tokens = x.shape[:-1].numel()
        statistics.add(x, self.get(linear.name, batch, tokens) if has_target else None)

    def outputs(self) -> KeptStates:
        """The block's outputs, by number of a batch in the dense stream, until the walk ends."""
        if not self._caches:
            return _RecomputedStates(self._stream.states, self._forward)
        for number in range(len(self._stream)):
            self._run_once(number)
        return self._stream.states

    def finish(self) -> None:
        """Replace the hidden states before the block by the dense block's outputs.

        Call it after the walk through the pruned block. It runs the batches that `get` did not.
        """
        for number in range(len(self._stream)):
            if number not in self._cache:
                self._stream.states.put(number, self._forward(number))
        self._cache.clear()

    def _cached(self, number: int, name: str) -> torch.Tensor | None:
        """The input of a linear, from the only run of the batch; None if no token reaches it."""
        self._run_once(number)
        cached = self._cache[number]
        x = cached.get(name)
        # Linears with the same input share their statistics and ask once, so drop it for all.
        self._cache[number] = {other: tensor for other, tensor in cached.items() if tensor is not x}
        return x

    def _run_once(self, number: int) -> None:
        """Run a batch, unless its inputs are known, and replace its hidden states."""
        if number in self._cache:
            return
        inputs: dict[str, torch.Tensor] = {}
        with input_hooks(
            list(self._linears.values()), lambda linear, x: inputs.update({linear.name: x})
        ):
            output = self._forward(number)
        # All inputs are known now, so the output can replace the block's input at once.
        self._stream.states.put(number, output)
        self._cache[number] = inputs

    def _recomputed(self, number: int, name: str) -> torch.Tensor | None:
        """The input of a linear, from a run of the batch that ends there; None without tokens."""
        inputs: list[torch.Tensor] = []

        def stop(_linear: Linear, x: torch.Tensor) -> None:
            inputs.append(x)
            raise StopForward

        with input_hooks([self._linears[name]], stop), contextlib.suppress(StopForward):
            self._forward(number)
        return inputs[0] if inputs else None


@dataclass(frozen=True)
class _RecomputedStates:
    """The outputs of a block, which are computed when they are asked for.

    Attributes:
        inputs: The hidden states before the block, of the shapes and dtypes of its outputs.
        forward: Number of a batch -> output of the block.
    """

    inputs: HiddenStates
    forward: Callable[[int], torch.Tensor]

    def layout(self, index: int) -> tuple[torch.Size, torch.dtype]:
        return self.inputs.layout(index)

    def get(self, index: int) -> torch.Tensor:
        return self.forward(index)


def drift_stride_for(tokens: int, width: int) -> int:
    """The largest stride that still shows how far inputs have drifted, at most `MAX_DRIFT_STRIDE`.

    The drift (X − X̂)ᵀX̂ is far smaller than the Gram matrix X̂ᵀX̂, so its relative error may be
    larger: `_TOKENS_PER_FEATURE` tokens per input feature are enough.

    Args:
        tokens: Number of tokens in all calibration windows.
        width: Number of inputs of the widest linear.

    >>> drift_stride_for(tokens=32 * 1024, width=1536)
    4
    >>> drift_stride_for(tokens=8 * 512, width=8960)
    1
    """
    return max(1, min(MAX_DRIFT_STRIDE, int(tokens / (_TOKENS_PER_FEATURE * width))))
