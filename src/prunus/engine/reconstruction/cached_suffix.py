"""The end of a block, after its attention, which runs many times on cached inputs.

Most architectures end a block with `hidden + mlp(norm(hidden))`. Block reconstruction then trains
only the linears of `mlp`, the suffix of the block:

    block input ──► norm, attention, norm ──► x ──► suffix (trained) ──► (+) ──► block output
                            │                                             ▲
                            └──────────────── residual ───────────────────┘

Nothing before the suffix changes while it is trained. So `x` and `residual` are computed once per
batch and cached: every later step runs neither attention nor its gradient. If the suffix treats
every token independently, a step can also run it on a part of the tokens.

A module is recognised as a suffix by trial, not by its name. This file knows a module and a
function that runs the block; it knows nothing about weights in files or about what the training is
for.

Legend: W windows, T tokens per window, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import nn

from prunus.model.calls import replaced_forward

#: All tokens of a window.
ALL_TOKENS = slice(None)

#: The batch whose forward pass is running. Each greenlet has a context of its own, so that paused
#: forward passes of other batches do not disturb it.
_BATCH: ContextVar[int] = ContextVar("batch")

#: Largest relative difference that still counts as rounding. Matrix products of another shape round
#: differently; a module that mixes tokens differs by as much as its whole output.
_ROUNDING = 0.02


class CachedSuffix:
    """A function from the number of a batch to the block's output; `find_suffix` makes one.

    It always uses the current weights of `module`.

    Args:
        module: The suffix.
        forward: Batch -> output of the whole block. With no windows it may skip the block.
        keep: Cache what reaches the suffix, two tensors of the size of the hidden states per batch.
            They come from `recording` or from the first call. If False, every call computes them
            again.
        by_token: The suffix treats every token independently and can run on some of them.

    Attributes:
        by_token: As given. `find_suffix` sets it after its trial.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[int], torch.Tensor],
        keep: bool = True,
        by_token: bool = False,
    ) -> None:
        self._module = module
        self._forward = forward
        self._keep = keep
        self.by_token = by_token
        # Batch -> the suffix's input x_WTH and the residual_WTH that its output is added to.
        self._cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[Callable[[int], torch.Tensor]]:
        """Yield a function that runs the block on a batch and fills the cache on the way.

        The pass in which the linears are pruned runs every batch anyway, so caching then saves a
        forward pass. The suffix runs too, because its linears need their input statistics, but its
        result is replaced by zeros: the function returns the residual. Several batches may be
        paused at a time, each in a greenlet of its own.
        """
        suffix_forward = self._module.forward
        inputs: dict[int, torch.Tensor] = {}

        def run_and_return_zeros(x_WTH: torch.Tensor) -> torch.Tensor:
            inputs[_BATCH.get()] = x_WTH
            return torch.zeros_like(suffix_forward(x_WTH))

        def forward(batch: int) -> torch.Tensor:
            _BATCH.set(batch)
            residual_WTH = self._forward(batch)
            self._cache[batch] = inputs.pop(batch), residual_WTH
            return residual_WTH

        with replaced_forward(self._module, run_and_return_zeros):
            yield forward

    def __call__(self, batch: int, tokens: slice = ALL_TOKENS) -> torch.Tensor:
        """The block's output (W, T, H) on these tokens of a batch.

        Only a suffix that is `by_token` can run on a part of the tokens.
        """
        x_WTH, residual_WTH = (whole[:, tokens] for whole in self.inputs(batch))
        return residual_WTH + self._module(x_WTH) if len(x_WTH) else residual_WTH

    def inputs(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The suffix's input and the residual that its output is added to, both (W, T, H)."""
        both = self._cache.get(batch) or self._run_prefix(batch)
        if self._keep:
            self._cache[batch] = both
        return both

    @torch.no_grad()
    def _run_prefix(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute what `inputs` returns, without a gradient: nothing before the suffix learns."""
        inputs: list[torch.Tensor] = []

        def record_and_return_zeros(x_WTH: torch.Tensor) -> torch.Tensor:
            inputs.append(x_WTH)
            return torch.zeros_like(x_WTH)

        # With zeros in place of the suffix's result, the block's output is the residual. The dtype
        # of the training is that of the suffix alone.
        device = next(self._module.parameters()).device.type
        with (
            replaced_forward(self._module, record_and_return_zeros),
            torch.autocast(device, enabled=False),
        ):
            residual_WTH = self._forward(batch)
        # A batch without windows may not run the block at all.
        (x_WTH,) = inputs or [residual_WTH]
        return x_WTH, residual_WTH


def suffix_module(block: nn.Module, linears: Sequence[str]) -> nn.Module | None:
    """The one direct child of `block` that holds all these linears, by their relative names.

    None if several children hold them, or if the one is itself a linear or a plain list of modules.
    """
    # Only direct children are tried: what is added last is a whole part of the block, like its MLP.
    children = {name.partition(".")[0] for name in linears}
    module = getattr(block, children.pop()) if len(children) == 1 else None
    if not isinstance(module, nn.Module) or isinstance(module, (nn.Linear, nn.ModuleList)):
        return None
    return module


def find_suffix(
    block: nn.Module,
    linears: Sequence[str],
    forward: Callable[[int], torch.Tensor],
    batch: int,
    keep: bool = True,
) -> CachedSuffix | None:
    """The suffix of a block that holds all trained linears, as far as one batch can show.

    A submodule is the suffix if the block calls it once, with a single tensor, and adds its result
    to the residual as the last operation. The check demands equality to the bit, so it makes no
    difference to the result whether a run uses the cache or the whole block.

    Args:
        block: The block with its weights in place.
        linears: Relative names of the trained linears.
        forward: Batch -> output of `block`.
        batch: Number of the batch for the check.
        keep: Cache what reaches the suffix; see `CachedSuffix`.

    Returns:
        None if the block has no such submodule.
    """
    module = suffix_module(block, linears)
    if module is None:
        return None
    suffix = CachedSuffix(module, forward, keep)
    try:
        # Compute the block's output in both ways: suffix on top of the residual, and whole block.
        with torch.no_grad():
            x, residual = suffix.inputs(batch)
            output = module(x)
            if not torch.equal(residual + output, forward(batch)):
                return None
            suffix.by_token = _treats_tokens_independently(module, x, output)
    except (TypeError, ValueError, RuntimeError):
        # The module takes more than one tensor, or is not called exactly once, or it returns
        # something other than a tensor.
        return None
    return suffix


def _treats_tokens_independently(module: nn.Module, x: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether `module` computes the same for every second token, with and without the others."""
    if x.dim() != 3 or x.shape[1] < 2:
        return False
    # Every second token: a module that looks at neighbours, before or after, would notice.
    some = slice(1, None, 2)
    alone, among_all = module(x[:, some]).float(), output[:, some].float()
    return bool((alone - among_all).norm() <= _ROUNDING * among_all.norm())
