"""A block from behind its attention on: what is trained when a block is matched, and run many times over.

Nothing before it changes meanwhile, so what reaches it may be kept: neither attention nor its gradients are computed
again. Knows a module and a function that runs it; nothing of weights in files, or of what training is for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

__all__ = ["Tail", "behind_attention", "find_tail"]

_BATCH: ContextVar[int] = ContextVar("batch")


def behind_attention(linears: Sequence[str]) -> list[str]:
    """Of a block's linears, by relative name in the order in which they run, those behind its attention.

    These are the ones outside the submodule that holds the first; where nothing else is left, all of them.
    """
    first = linears[0].partition(".")[0]
    return [name for name in linears if name.partition(".")[0] != first] or list(linears)


class Tail:
    """Batch -> output of the block, as often as you like with other weights in `module`; see `find_tail`.

    What reaches the module from before is kept, two hidden states: from `recording`, or from a batch's first time.
    """

    def __init__(self, module: nn.Module, forward: Callable[[int], torch.Tensor]) -> None:
        self._module, self._forward = module, forward
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[Callable[[int], torch.Tensor]]:
        """While active: batch -> output of the block without the module's part, which runs all the same.

        What reaches the module is kept. Several batches may be on their way at a time, each in a greenlet of its own.
        """
        inner = self._module.forward
        given: dict[int, torch.Tensor] = {}

        def see(x: torch.Tensor) -> torch.Tensor:
            given[_BATCH.get()] = x
            return torch.zeros_like(inner(x))

        def forward(batch: int) -> torch.Tensor:
            _BATCH.set(batch)  # every greenlet has a context of its own
            beside = self._forward(batch)
            self._kept[batch] = given.pop(batch), beside
            return beside

        with _in_place_of(self._module, see):
            yield forward

    def __call__(self, batch: int) -> torch.Tensor:
        if batch not in self._kept:
            self._kept[batch] = self._before(batch)
        x, beside = self._kept[batch]
        return beside + self._module(x)

    @torch.no_grad()
    def _before(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The module's input, and the block's output if the module gave zeros."""
        given: list[torch.Tensor] = []

        def zeros(x: torch.Tensor) -> torch.Tensor:
            given.append(x)
            return torch.zeros_like(x)

        with _in_place_of(self._module, zeros):
            beside = self._forward(batch)
        (x,) = given
        return x, beside


def find_tail(
    block: nn.Module, trained: Sequence[str], forward: Callable[[int], torch.Tensor], batch: int
) -> Tail | None:
    """The submodule of `block` that holds all trained linears, where it is the block's last word; tried on a batch.

    That is where it is called once, with one tensor and nothing else, and its result is added to what the block gives
    without it: to the bit, so that it does not matter which of the two ways is taken.

    Args:
        block: with its weights in place.
        trained: relative names of linears.
        forward: batch -> output of `block`.
        batch: number of the batch to try it on.

    Returns:
        None where there is no such submodule.
    """
    children = {name.partition(".")[0] for name in trained}
    module = getattr(block, children.pop()) if len(children) == 1 else None
    if not isinstance(module, nn.Module) or isinstance(module, (nn.Linear, nn.ModuleList)):
        return None
    tail = Tail(module, forward)
    try:
        with torch.no_grad():
            parts = tail(batch)
            same = torch.equal(parts, forward(batch))
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ):  # called with more, or not once; or it gives more than a tensor
        return None
    return tail if same else None


@contextlib.contextmanager
def _in_place_of(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """While active, `module` does what `function` does."""
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
