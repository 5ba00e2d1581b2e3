"""Hooks that show what linears and experts are given while a block runs.

The only forward hooks of prunus are here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from prunus.model.linears import Linear
from prunus.pruning.block.expert_tokens import ExpertCounter


def tokens_of(x: torch.Tensor) -> torch.Tensor:
    """Flatten (…, in) to one row per token.

    >>> tokens_of(torch.zeros(2, 5, 8)).shape
    torch.Size([10, 8])
    """
    return x.reshape(-1, x.shape[-1])


@contextlib.contextmanager
def input_hooks(
    linears: Sequence[Linear],
    on_input: Callable[[Linear, torch.Tensor], object],
    expert_counters: Sequence[ExpertCounter] = (),
    on_routing: Callable[[ExpertCounter, torch.Tensor], object] | None = None,
) -> Iterator[None]:
    """While active, call a function before every forward of certain modules.

    Args:
        on_input: called with a linear and its input (…, in).
        on_routing: called with a counter and the numbers of the experts that each token chose,
            integers (tokens, experts per token). Required where there are counters.
    """

    def input_hook(linear: Linear) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            on_input(linear, args[0])

        return hook

    def routing_hook(
        counter: ExpertCounter,
    ) -> Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert on_routing is not None
            on_routing(counter, counter.experts.arguments(args, kwargs)[1])

        return hook

    handles = [linear.module.register_forward_pre_hook(input_hook(linear)) for linear in linears]
    handles += [
        counter.experts.register_forward_pre_hook(routing_hook(counter), with_kwargs=True)
        for counter in expert_counters
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def output_hooks(
    linears: Sequence[Linear],
    on_output: Callable[[Linear, torch.Tensor, torch.Tensor], object],
) -> Iterator[None]:
    """While active, call a function after every forward of some linears."""

    def hook(linear: Linear) -> Callable[[torch.nn.Module, tuple[Any, ...], torch.Tensor], None]:
        def observe(_module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            on_output(linear, args[0], output)

        return observe

    handles = [linear.module.register_forward_hook(hook(linear)) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
