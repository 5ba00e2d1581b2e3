"""What the walks through a block have in common: seeing what linears and experts are given, and counting it.

The only forward pre-hooks of prunus are here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from prunus.methods.statistics import InputStatistics
from prunus.model.linears import Linear
from prunus.pruning.block.expert_tokens import ExpertCounter

__all__ = [
    "Accumulate",
    "Finish",
    "Forward",
    "NewStatistics",
    "Prune",
    "accumulate_inputs",
    "execution_order",
    "input_hooks",
    "tokens_of",
]

Forward = Callable[[int], torch.Tensor]
Finish = Callable[[int, torch.Tensor], None]
Prune = Callable[[Linear, InputStatistics], None]
NewStatistics = Callable[[Linear], InputStatistics]
# Adds the input (tokens, in) of a linear in batch i to statistics.
Accumulate = Callable[[InputStatistics, Linear, int, torch.Tensor], None]


def accumulate_inputs(
    statistics: InputStatistics, linear: Linear, batch: int, x_TI: torch.Tensor
) -> None:
    """Add the input to the statistics, and nothing else."""
    statistics.add(x_TI)


def tokens_of(x: torch.Tensor) -> torch.Tensor:
    """(…, in) as (tokens, in)."""
    return x.reshape(-1, x.shape[-1])


def execution_order(
    linears: Sequence[Linear], expert_counters: Sequence[ExpertCounter]
) -> list[str]:
    """Names of linears in the order in which they are registered, each experts module before its first linear."""
    names: list[str] = []
    for linear in linears:
        names += [
            each.name
            for each in expert_counters
            if each.owns(linear.name) and each.name not in names
        ]
        names.append(linear.name)
    return names


@contextlib.contextmanager
def input_hooks(
    linears: Sequence[Linear],
    see: Callable[[Linear, torch.Tensor], object],
    expert_counters: Sequence[ExpertCounter] = (),
    see_routing: Callable[[ExpertCounter, torch.Tensor], object] | None = None,
) -> Iterator[None]:
    """While active, `see(linear, input)` is called before every forward of every linear.

    And `see_routing(routing, experts chosen (tokens, experts per token))` before that of every experts module.
    """

    def hook_for(linear: Linear) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            see(linear, args[0])

        return hook

    def routing_hook_for(
        expert_counter: ExpertCounter,
    ) -> Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert see_routing is not None
            see_routing(expert_counter, expert_counter.experts.arguments(args, kwargs)[1])

        return hook

    handles = [linear.module.register_forward_pre_hook(hook_for(linear)) for linear in linears]
    handles += [
        expert_counter.experts.register_forward_pre_hook(
            routing_hook_for(expert_counter), with_kwargs=True
        )
        for expert_counter in expert_counters
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
