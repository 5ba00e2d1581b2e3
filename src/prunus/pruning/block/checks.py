"""What is looked at before a block is pruned and after: weights that can be, and the same result on all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from prunus.distributed import RankError, Ranks
from prunus.hardware.numerics import all_finite
from prunus.model.source import tensors_digest

__all__ = ["check_same", "checked_digest"]


def check_same(ranks: Ranks, name: str, changed: Mapping[str, torch.Tensor]) -> None:
    """See that all ranks have pruned to the same bytes, as they must: each computes with its own.

    Raises:
        RankError: they have not, as processors of different kinds may not; names the ranks.
    """
    if ranks.size == 1:
        return
    digests = ranks.gather_text(tensors_digest(changed))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise RankError(
            f"{name} was pruned to other bytes on rank {', '.join(map(str, others))} than on rank 0: their machines "
            "round differently. Run the ranks on machines of one kind"
        )


def checked_digest(block_name: str, stored: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a block's tensors as stored, which must be finite.

    Raises:
        ValueError: they are not; names the tensor.
    """
    for key in sorted(stored):
        tensor = stored[key]
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(
                f"{block_name}.{key} holds weights that are not finite (NaN or infinity); it cannot be pruned"
            )
    return tensors_digest(stored)
