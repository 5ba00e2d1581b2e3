"""The batches of hidden states that training steps use, on every rank.

The recipe decides which windows form a step, so that one process and many take the same steps.
The owner of a batch therefore sends it to all ranks. That is cheap: the input
and the target of a few windows are much smaller than the gradients of a block.

Each rank then computes with a part of the windows, and the gradients are summed. A batch of a
single window cannot be split: all ranks compute the same with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.model.hidden_states import HiddenStates


def step_ranks(ranks: Ranks, windows: int, device: torch.device) -> Ranks:
    """Return the ranks that split the windows of one training step.

    These are all ranks, or only this one if a batch cannot be split. On CUDA they are always all
    ranks: gradients need not be the same twice there, so even the gradient of a single window comes
    from one rank for all.
    """
    return ranks if windows > 1 or device.type == "cuda" else SINGLE_PROCESS


def step_parts(batches: Sequence[torch.Tensor], split: Ranks) -> list[torch.Tensor]:
    """What a rank may get of each batch in a training step.

    Blocks must know how they are called with as many windows.
    """
    return [ids[: len(split.own_range(len(ids)))] for ids in batches]


class ReconstructionBatches:
    """The batches of all ranks as one sequence, in the order of ranks.

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
        """Return the shape of a batch with all its windows."""
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
