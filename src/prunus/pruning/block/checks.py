"""Checks around the pruning of a block: finite weights, equal results on all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from prunus.distributed import RankError, Ranks
from prunus.hardware.numerics import all_finite
from prunus.model.source import tensors_digest

__all__ = ["check_same", "checked_digest"]


def check_same(ranks: Ranks, name: str, changed: Mapping[str, torch.Tensor]) -> None:
    """Check that all ranks have pruned to the same bytes. Each must: it goes on with its own.

    Args:
        ranks: the processes of the run; all call it at once.
        name: what was pruned, for the message.
        changed: the pruned tensors of this rank.

    Raises:
        RankError: the bytes differ, as they may on processors of different kinds. Names the ranks.
    """
    if ranks.size == 1:
        return
    digests = ranks.gather_text(tensors_digest(changed))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise RankError(
            f"{name} was pruned to other bytes on rank {', '.join(map(str, others))} than on "
            "rank 0: their machines round differently. Run the ranks on machines of one kind"
        )


def checked_digest(block_name: str, stored: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of a block's tensors as stored, after a check that all are finite.

    Raises:
        ValueError: a tensor holds NaN or infinity; names the tensor.
    """
    for key in sorted(stored):
        tensor = stored[key]
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(
                f"{block_name}.{key} holds weights that are not finite (NaN or infinity), so the "
                "block cannot be pruned: check the checkpoint"
            )
    return tensors_digest(stored)
