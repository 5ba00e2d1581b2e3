"""Hooks that show what linears and experts are given while a block runs.

The only forward hooks of prunus are here.

Shape suffixes: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.distributed import Ranks
from prunus.methods.statistics import Needs
from prunus.model.experts import Experts
from prunus.model.linears import Linear


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

    `on_routing` gets a counter and the numbers of the experts that each token chose (T, K).
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
    linears: Sequence[Linear], on_output: Callable[[Linear, torch.Tensor, torch.Tensor], object]
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


#: An expert with fewer tokens than this loses less when it is pruned by the statistics of all
#: tokens. Norms need few tokens; a Gram matrix of few tokens has no full rank. The measurements are
#: in docs/reference/models.md.
MIN_TOKENS: dict[Needs, int] = {"none": 0, "norms": 32, "gram": 512}


class ExpertCounter:
    """Counts the tokens that choose each expert of one experts module.

    An expert that fewer than `min_tokens` tokens chose is measured on all tokens of the calibration
    set, as if all had chosen it. Its gate and up projections see what the experts module is given,
    its down projection sees what they make of that. The block itself continues with the tokens that
    chose the expert. They are counted while all batches of all ranks wait at the experts module, so
    the counts are those of the pruned model.
    """

    def __init__(self, name: str, experts: Experts, min_tokens: int) -> None:
        self.name = name
        self.experts = experts
        self.min_tokens = min_tokens
        self._by_batch: dict[int, Tensor] = {}
        self._tokens_E: list[int] | None = None

    def owns(self, linear: str) -> bool:
        """Whether a linear, by its name relative to the block, belongs to these experts."""
        return linear.startswith(f"{self.name}.")

    def count(self, batch: int, chosen_TK: Tensor) -> None:
        """Count the tokens of one batch by chosen expert; if it runs again, it is counted anew."""
        chosen = chosen_TK.flatten()
        # Some models use numbers out of range for slots that no expert fills.
        known = chosen[(chosen >= 0) & (chosen < self.experts.count)]
        self._by_batch[batch] = torch.bincount(known, minlength=self.experts.count).cpu()

    def complete(self, ranks: Ranks) -> None:
        """Add up the counts of all ranks, which call it; choose what is measured on all tokens."""
        own_E = sum(self._by_batch.values(), torch.zeros(self.experts.count, dtype=torch.int64))
        counts = ranks.gather_ints(own_E.tolist())
        self._tokens_E = [sum(each) for each in zip(*counts, strict=True)]
        self.experts.measured_on_all = frozenset(
            number for number, tokens in enumerate(self._tokens_E) if tokens < self.min_tokens
        )

    def reset(self) -> None:
        """Let every expert see only the tokens that chose it again."""
        self.experts.measured_on_all = frozenset()

    def notes(self, linear: str) -> dict[str, Any]:
        """The manifest's notes on a linear of these experts; none before `complete`."""
        if self._tokens_E is None:
            return {}
        tokens = self._tokens_E[int(linear.removeprefix(f"{self.name}.").partition(".")[0])]
        if tokens >= self.min_tokens:
            return {"routed_tokens": tokens}
        return {
            "routed_tokens": tokens,
            "measured_on": (
                f"all tokens of the block: fewer than {self.min_tokens} chose this expert"
            ),
        }


def find_expert_counters(
    block: nn.Module, linears: Iterable[str], needs: Needs, requested: int | None
) -> list[ExpertCounter]:
    """A counter for every module that owns one of `linears`; `requested` replaces `MIN_TOKENS`."""
    min_tokens = MIN_TOKENS[needs] if requested is None else requested
    if min_tokens == 0 or needs == "none":
        return []
    names = list(linears)
    counters = [
        ExpertCounter(name, module, min_tokens)
        for name, module in block.named_modules()
        if isinstance(module, Experts)
    ]
    return [counter for counter in counters if any(counter.owns(name) for name in names)]
