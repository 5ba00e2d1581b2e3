"""The block loop's body: hidden states before the first block, then one block after the other.

Knows weights, hidden states and walks; nothing of folders, manifests on disk, or where text comes from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from prunus.engine.hidden import HiddenStates
from prunus.engine.linear import LinearJob, prune_linear
from prunus.engine.lockstep import lockstep, replay, two_pass
from prunus.manifest import BlockRecord, LinearRecord, Walk
from prunus.model.linears import Linear
from prunus.model.skeleton import BlockCall, Skeleton, hidden_of
from prunus.model.source import Source
from prunus.statistics import InputStatistics

__all__ = ["BlockEngine"]

_WALKS: dict[Walk, Callable[..., list[Linear]]] = {
    "lockstep": lockstep,
    "replay": replay,
    "two_pass": two_pass,
}


@dataclass
class BlockEngine:
    """Takes all calibration windows through a model, one block at a time.

    Attributes:
        skeleton: the model without weights.
        source: its weights.
        linear_job: what is done to each linear.
        device: where blocks and, between blocks, hidden states live.
    """

    skeleton: Skeleton
    source: Source
    linear_job: LinearJob
    device: torch.device
    _states: HiddenStates | None = field(default=None, init=False)
    _calls: dict[int, list[BlockCall]] = field(default_factory=dict, init=False)

    def embed(self, batches: Sequence[torch.Tensor], spill_to: Path | None, on_device: bool = True) -> None:
        """Run what comes before the blocks on token ids (windows, tokens) per batch.

        Args:
            batches: token ids; empty where the method looks at weights only.
            spill_to: folder for a file of hidden states, or None to keep them in memory.
            on_device: keep hidden states on the device between blocks rather than in pinned host memory.

        Raises:
            ValueError: the embeddings give hidden states that are not finite.
            NotImplementedError: blocks are called with arguments that depend on the text.
        """
        self._states = HiddenStates(len(batches), spill_to=spill_to, device=self.device, on_device=on_device)
        if not batches:
            return
        with self.skeleton.surroundings(self.source.outer, self.device):
            for position, ids in enumerate(batches):
                hidden, recorded = self.skeleton.record(ids.to(self.device))
                if not bool(torch.isfinite(hidden).all()):
                    raise ValueError(
                        "the embeddings give hidden states that are not finite; check the checkpoint's weights"
                    )
                self._states.fill(position, hidden)
                self._remember(len(ids), recorded)

    def _remember(self, windows: int, recorded: list[BlockCall]) -> None:
        """Blocks are called with the first batch's arguments for all, so these must not depend on the text."""
        known = self._calls.setdefault(windows, recorded)
        for index, (left, right) in enumerate(zip(known, recorded, strict=True)):
            if not left.same_as(right):
                raise NotImplementedError(
                    f"block {index} is called with arguments that depend on the text itself; such models cannot be "
                    "pruned block by block yet"
                )

    def propagate(self, index: int, stored: Mapping[str, torch.Tensor]) -> None:
        """Run a finished block (tensors by relative name) over all batches, as when it was pruned."""
        assert self._states is not None, "embed comes first"
        if not len(self._states):
            return
        forward = self._forward(self.skeleton.fill(index, stored, self.device), index)
        for batch in range(len(self._states)):
            self._states.put(batch, forward(batch))
        self.skeleton.release(index)

    def prune(
        self, index: int, stored: Mapping[str, torch.Tensor], targets: Sequence[str], walk: Walk
    ) -> tuple[dict[str, torch.Tensor], BlockRecord]:
        """Prune one block and take all batches through it.

        Args:
            index: position of the block.
            stored: its tensors by relative name, in the checkpoint's dtypes.
            targets: relative names of the linears to prune.
            walk: how the batches go through; see `lockstep`.

        Returns:
            The pruned tensors by relative name, in dtype and orientation of `stored`; the record (its seconds are the
            caller's to fill in).

        Raises:
            ValueError: weights or activations that are not finite; names the tensor.
        """
        assert self._states is not None, "embed comes first"
        name = self.skeleton.block_name(index)
        digest = _checked_digest(name, stored)
        block = self.skeleton.fill(index, stored, self.device)
        linears = [linear for linear in self.skeleton.linears(index) if linear.name in targets]
        changed: dict[str, torch.Tensor] = {}
        records: dict[str, LinearRecord] = {}

        def new_statistics(linear: Linear) -> InputStatistics:
            as_original = self.linear_job.options.as_original
            return InputStatistics(linear.shape[1], self.linear_job.method.needs, self.device, as_original)

        def prune_one(linear: Linear, statistics: InputStatistics) -> None:
            key = f"{linear.name}.weight"
            changed[key], records[linear.name] = prune_linear(
                self.linear_job, linear, f"{name}.{linear.name}", stored[key], statistics
            )

        unreached = linears
        if len(self._states):
            forward = self._forward(block, index)
            unreached = _WALKS[walk](
                linears, len(self._states), forward, self._states.put, new_statistics, prune_one
            )
        for linear in unreached:
            prune_one(linear, new_statistics(linear))
        self.skeleton.release(index)
        ordered = {linear.name: records[linear.name] for linear in linears}
        return changed, BlockRecord(name=name, input_sha256=digest, walk=walk, linears=ordered)

    def prune_head(self, batches: Sequence[torch.Tensor]) -> tuple[dict[str, torch.Tensor], LinearRecord]:
        """Prune the output head on what the final norm gives after the last block.

        Returns:
            The pruned tensor by its name in the model, in its stored dtype, and the record.
        """
        assert self._states is not None, "embed comes first"
        head = self.skeleton.head()
        key = f"{head.name}.weight"
        with self.skeleton.surroundings(self.source.outer, self.device, with_head=True):
            statistics = InputStatistics(head.shape[1], self.linear_job.method.needs, self.device)
            for position, ids in enumerate(batches):
                x = self.skeleton.head_input(ids.to(self.device), self._states.get(position))
                statistics.add(x.reshape(-1, x.shape[-1]))
            stored = self.source.outer([key], self.skeleton.model)[key]
            pruned, record = prune_linear(self.linear_job, head, head.name, stored, statistics)
        return {key: pruned}, record

    def _forward(self, block: nn.Module, index: int) -> Callable[[int], torch.Tensor]:
        """A function that runs `block` on batch i."""
        states = self._states
        assert states is not None

        def forward(batch: int) -> torch.Tensor:
            hidden = states.get(batch)
            call = self._calls[hidden.shape[0]][index]
            version = hidden._version
            output = hidden_of(block(hidden, *call.args, **call.kwargs))
            if hidden._version != version:
                raise NotImplementedError(
                    f"{self.skeleton.block_name(index)} changes its input in place; such models cannot be pruned yet"
                )
            return output

        return forward

    def close(self) -> None:
        """Release hidden states."""
        if self._states is not None:
            self._states.close()


def _checked_digest(block_name: str, stored: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a block's tensors as stored, which must be finite."""
    digest = hashlib.sha256()
    for key in sorted(stored):
        tensor = stored[key]
        # aminmax passes NaN on, and takes a fortieth of isfinite's time on a CPU.
        if tensor.is_floating_point() and not all(x.isfinite() for x in torch.aminmax(tensor)):
            raise ValueError(
                f"{block_name}.{key} holds weights that are not finite (NaN or infinity); it cannot be pruned"
            )
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
