"""A source that notes the hash of every block it reads, so that a resumed run can compare them."""

from __future__ import annotations

from typing import Any

import torch

from prunus.model.skeleton import Skeleton
from prunus.model.source import Source, tensors_digest

__all__ = ["HashedSource"]


class HashedSource:
    """Reads blocks of another source, and notes what was read."""

    def __init__(self, source: Source, skeleton: Skeleton, digests: dict[str, str]) -> None:
        self._source, self._skeleton, self._digests = source, skeleton, digests

    def block(self, index: int, pinned: bool = False) -> dict[str, torch.Tensor]:
        """The tensors of a block, as the other source reads them."""
        found = self._source.block(index, pinned)
        name = self._skeleton.block_name(index)
        if name not in self._digests:
            self._digests[name] = tensors_digest(found)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)
