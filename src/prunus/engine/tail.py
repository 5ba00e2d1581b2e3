"""A block from behind its attention on: what is trained when a block is matched, and run many times over.

Nothing before it changes meanwhile, so what reaches it may be kept: neither attention nor its gradients are computed
again. Knows a module and a function that runs it; nothing of weights in files, or of what training is for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["Tail", "behind_attention", "find_tail"]


def behind_attention(linears: Sequence[str]) -> list[str]:
    """Of a block's linears, by relative name in the order in which they run, those behind its attention.

    These are the ones outside the submodule that holds the first; where nothing else is left, all of them.
    """
    first = linears[0].partition(".")[0]
    return [name for name in linears if name.partition(".")[0] != first] or list(linears)


class Tail:
    """Batch -> output of the block, as often as you like with other weights in `module`; see `find_tail`.

    What reaches it from before is computed at a batch's first time and kept: two hidden states.
    """

    def __init__(self, module: nn.Module, forward: Callable[[int], torch.Tensor]) -> None:
        self._module, self._forward = module, forward
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

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
