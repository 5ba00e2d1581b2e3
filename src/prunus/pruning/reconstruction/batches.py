"""What a step of training takes, on every rank: a batch of hidden states, whoever has it.

Which batches make a step is the recipe's, so that one process and many take the same steps. A batch is therefore
handed to all ranks when its turn comes: two hidden states of a few windows, where a block's gradients would be many
times as much. Of a batch of several windows each rank then takes its part, and gradients are summed; a single window
is every rank's, and each computes the same with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.model.hidden_states import HiddenStates

__all__ = ["ReconstructionBatches", "step_ranks"]


def step_ranks(ranks: Ranks, windows: int, device: torch.device) -> Ranks:
    """Those who take a step's windows apart: all ranks, or each all of them alone.

    Args:
        ranks: of the run.
        windows: in the largest batch.
        device: where gradients are computed. On CUDA they need not come out twice the same, so they are always summed:
            of a single window one rank then computes them for all.
    """
    return ranks if windows > 1 or device.type == "cuda" else SINGLE_PROCESS


class ReconstructionBatches:
    """The batches of all ranks in one row, in the order of ranks. To make one, and `get`, are meetings.

    Args:
        states: this rank's.
        chosen: numbers of those among them that are meant.
        counts: how many of them each rank has.
        ranks: of the run.
        split: see `step_ranks`.
        device: where `get` puts them.
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
        layouts = [states.layout(batch) for batch in chosen]
        mine = json.dumps(
            [[list(shape), str(dtype).removeprefix("torch.")] for shape, dtype in layouts]
        )
        self._layouts = [each for text in ranks.gather_text(mine) for each in json.loads(text)]

    def __len__(self) -> int:
        return len(self._owners)

    def shape(self, batch: int) -> tuple[int, ...]:
        """Of a batch with all its windows."""
        return tuple(self._layouts[batch][0])

    def get(self, batch: int) -> torch.Tensor:
        """This rank's windows of a batch, which may be none."""
        owner, (shape, dtype) = self._owners[batch], self._layouts[batch]
        if owner == self._ranks.rank:
            # Kernels may round differently on other strides, and those who are sent it get none.
            whole = self._states.get(self._chosen[batch - self._first]).contiguous()
        else:
            whole = torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)
        self._ranks.broadcast(whole, owner)
        mine = self._split.own_range(len(whole))
        return whole[mine.start : mine.stop]
