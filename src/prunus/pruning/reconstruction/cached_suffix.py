"""A block from behind its attention on: what is trained when a block is matched, and run many times over.

Nothing before it changes meanwhile, so what reaches it may be kept: neither attention nor its gradients are computed
again. Where it takes every token for itself, it can be run on some of them. Knows a module and a function that runs it;
nothing of weights in files, or of what training is for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import nn

from prunus.model.calls import replaced_forward

__all__ = ["ALL_TOKENS", "CachedSuffix", "after_attention", "find_suffix", "suffix_module"]

ALL_TOKENS = slice(None)
_BATCH: ContextVar[int] = ContextVar("batch")
#: Products of other shapes are rounded differently; a module that looks at other tokens is off by its whole output.
_ROUNDING = 0.02


def after_attention(linears: Sequence[str]) -> list[str]:
    """Of a block's linears, by relative name in the order in which they run, those behind its attention.

    These are the ones outside the submodule that holds the first; where nothing else is left, all of them.
    """
    first = linears[0].partition(".")[0]
    return [name for name in linears if name.partition(".")[0] != first] or list(linears)


class CachedSuffix:
    """Batch -> output of the block, as often as you like with other weights in `module`; see `find_suffix`.

    Args:
        module: the last word of the block.
        forward: batch -> output of the block; of no windows it may be none.
        keep: what reaches the module from before is kept, two hidden states: from `recording`, or from a batch's first
            time. Otherwise it is computed every time.
        by_token: the module takes every token for itself, so that it can be run on some of them.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[int], torch.Tensor],
        keep: bool = True,
        by_token: bool = False,
    ) -> None:
        self._module, self._forward, self._keep, self.by_token = module, forward, keep, by_token
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

        with replaced_forward(self._module, see):
            yield forward

    def __call__(self, batch: int, tokens: slice = ALL_TOKENS) -> torch.Tensor:
        """The block's output (windows, tokens, hidden) of these tokens; of others than all only where `by_token`."""
        x, beside = (whole[:, tokens] for whole in self.before(batch))
        return beside + self._module(x) if len(x) else beside

    def before(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The module's input, and the block's output if the module gave zeros: as kept, or by running the block."""
        found = self._kept.get(batch) or self._run_before(batch)
        if self._keep:
            self._kept[batch] = found
        return found

    @torch.no_grad()
    def _run_before(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        given: list[torch.Tensor] = []

        def zeros(x: torch.Tensor) -> torch.Tensor:
            given.append(x)
            return torch.zeros_like(x)

        with replaced_forward(self._module, zeros):
            beside = self._forward(batch)
        (x,) = given or [beside]  # of no windows the block may not have been run
        return x, beside


def suffix_module(block: nn.Module, trained: Sequence[str]) -> nn.Module | None:
    """The one submodule of `block` that holds all of these linears, if it is more than a linear itself."""
    children = {name.partition(".")[0] for name in trained}
    module = getattr(block, children.pop()) if len(children) == 1 else None
    if not isinstance(module, nn.Module) or isinstance(module, (nn.Linear, nn.ModuleList)):
        return None
    return module


def find_suffix(
    block: nn.Module,
    trained: Sequence[str],
    forward: Callable[[int], torch.Tensor],
    batch: int,
    keep: bool = True,
) -> CachedSuffix | None:
    """The submodule of `block` that holds all trained linears, where it is the block's last word; tried on a batch.

    That is where it is called once, with one tensor and nothing else, and its result is added to what the block gives
    without it: to the bit, so that it does not matter which of the two ways is taken.

    Args:
        block: with its weights in place.
        trained: relative names of linears.
        forward: batch -> output of `block`.
        batch: number of the batch to try it on.
        keep: see `CachedSuffix`.

    Returns:
        None where there is no such submodule.
    """
    module = suffix_module(block, trained)
    if module is None:
        return None
    tail = CachedSuffix(module, forward, keep)
    try:
        with torch.no_grad():
            x, beside = tail.before(batch)
            made = module(x)
            if not torch.equal(beside + made, forward(batch)):
                return None
            tail.by_token = _takes_tokens_apart(module, x, made)
    except (TypeError, ValueError, RuntimeError):
        return None  # called with more, or not once; or it gives more than a tensor
    return tail


def _takes_tokens_apart(module: nn.Module, x: torch.Tensor, made: torch.Tensor) -> bool:
    """Whether `module` makes of every second token of `x` alone what it `made` of them among all."""
    if x.dim() != 3 or x.shape[1] < 2:
        return False
    some = slice(1, None, 2)
    alone, among_all = module(x[:, some]).float(), made[:, some].float()
    return bool((alone - among_all).norm() <= _ROUNDING * among_all.norm())
