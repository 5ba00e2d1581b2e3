"""A source that notes the hash of every block it reads, and refuses a block that was changed."""

from __future__ import annotations

from typing import Any

import torch

from prunus.model.skeleton import Skeleton
from prunus.model.source import Source, tensors_digest


def check_measured(digests: dict[str, str], block: str, digest: str) -> None:
    """Check that a block still has the weights that a measurement before the run read.

    Args:
        digests: Name of a block -> SHA-256 of the weights that were read.
        digest: SHA-256 of its weights now.
    """
    if digests.get(block, digest) != digest:
        raise FileExistsError(
            f"{block} of the source is not what it was when the run measured the model: the "
            "checkpoint was changed since. Put it back as it was, or choose `overwrite` to start "
            "again"
        )


class HashedSource:
    """Reads blocks of another source, and notes or compares what it reads for the first time.

    Args:
        digests: Name of a block -> SHA-256 of its weights; gets an entry for each block.
    """

    def __init__(self, source: Source, skeleton: Skeleton, digests: dict[str, str]) -> None:
        self._source, self._skeleton, self._digests = source, skeleton, digests
        self._seen: set[int] = set()

    def block(self, index: int, pinned: bool = False) -> dict[str, torch.Tensor]:
        """The tensors of a block, as the other source reads them."""
        found = self._source.block(index, pinned)
        if index not in self._seen:
            self._seen.add(index)
            name, digest = self._skeleton.block_name(index), tensors_digest(found)
            check_measured(self._digests, name, digest)
            self._digests[name] = digest
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)
