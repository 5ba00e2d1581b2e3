"""How a model calls one of its blocks, what a block returns, and how to replace its forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class BlockCall:
    """The arguments with which the model calls one block, apart from the hidden states.

    Masks, positions and rotary embeddings are among them.

    >>> call = BlockCall((), {"attention_mask": None, "position_ids": torch.arange(4)})
    >>> call.same_as(BlockCall((), {"attention_mask": None, "position_ids": torch.arange(4)}))
    True
    >>> call.same_as(BlockCall((), {"attention_mask": None, "position_ids": torch.arange(5)}))
    False
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def same_as(self, other: BlockCall) -> bool:
        """Whether both calls pass equal values; tensors are compared by shape and content."""
        return _equal(self.args, other.args) and _equal(self.kwargs, other.kwargs)


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in the output of a block: the tensor itself, or the first of a tuple.

    >>> hidden_of((torch.tensor(1.0), "attention weights"))
    tensor(1.)
    """
    return output[0] if isinstance(output, tuple | list) else output


def split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """Split the arguments of a block into the hidden states and the others.

    Hidden states are the first positional argument, or the keyword `hidden_states`.

    >>> split_hidden((), {"hidden_states": torch.tensor(1.0), "use_cache": False})
    (tensor(1.), (), {'use_cache': False})
    """
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
    """While active, calling `module` runs `function` in place of its `forward`; hooks still run.

    Blocks nest: the inner one ends first and brings back the function of the outer one.

    >>> linear = nn.Linear(2, 2)
    >>> with replaced_forward(linear, lambda x: x + 1):
    ...     linear(torch.zeros(2))
    tensor([1., 1.])
    >>> "forward" in vars(linear)
    False
    """
    # An attribute of the instance hides the method of the class. It may be there already, from
    # another replacement or from a library.
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
