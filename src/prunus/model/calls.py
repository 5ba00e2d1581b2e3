"""How a model calls one of its blocks, and what a block returns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["BlockCall", "hidden_of", "replaced_forward", "split_hidden"]


@dataclass(frozen=True)
class BlockCall:
    """The arguments with which the model calls one block, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def same_as(self, other: BlockCall) -> bool:
        """Whether both calls pass equal values."""
        return _equal(self.args, other.args) and _equal(self.kwargs, other.kwargs)


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a block returned: the tensor itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states of a call, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _equal(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.shape == right.shape
            and torch.equal(left, right)
        )
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(
            _equal(a, b) for a, b in zip(left, right, strict=True)
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    return bool(left == right)


@contextlib.contextmanager
def replaced_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """While active, `module` does what `function` does."""
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
