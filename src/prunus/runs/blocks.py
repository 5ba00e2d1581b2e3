"""Checks around the pruning of a block: finite weights, equal results on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from prunus.distributed import RankError, Ranks
from prunus.hardware.numerics import all_finite
from prunus.model.source import tensors_digest


def check_same(ranks: Ranks, name: str, changed: Mapping[str, torch.Tensor]) -> None:
    """Check that all ranks have pruned to the same bytes. Each must: it continues with its own."""
    if ranks.size == 1:
        return
    digests = ranks.gather_text(tensors_digest(changed))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise RankError(
            f"{name} was pruned to other bytes on rank {', '.join(map(str, others))} than on "
            "rank 0: their machines round differently. Run the ranks on machines of one kind"
        )


class StoredBlock(NamedTuple):
    """A block as a checkpoint stores it.

    Attributes:
        tensors: its tensors by relative name, in the checkpoint's dtypes.
        digest: their SHA-256.
    """

    tensors: Mapping[str, torch.Tensor]
    digest: str


def read_stored(name: str, tensors: Mapping[str, torch.Tensor]) -> StoredBlock:
    """Read every byte of a block, and check that all weights are finite."""
    for key in sorted(tensors):
        tensor = tensors[key]
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(
                f"{name}.{key} holds weights that are not finite (NaN or infinity), so the "
                "block cannot be pruned: check the checkpoint"
            )
    return StoredBlock(tensors, tensors_digest(tensors))
