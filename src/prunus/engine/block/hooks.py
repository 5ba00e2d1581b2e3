"""Hooks that show what linears and experts are given while a block runs.

The only forward hooks of prunus are here: `input_hooks` and `output_hooks`. The second half of the
file decides, with `ExpertCounter`, which tokens the statistics of an expert come from.

Shape suffixes: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.distributed import sum_ints
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
    on_routing: Callable[[ExpertCounter, torch.Tensor], object] = lambda *_: None,
) -> Iterator[None]:
    """While active, call a function before every forward of certain modules.

    An exception that a function raises ends the forward pass. Walks use this to stop early.

    Args:
        linears: Linears to observe.
        on_input: Called with a linear and its input (…, in), before the linear runs.
        expert_counters: Counters of the experts modules to observe.
        on_routing: Called with a counter and the numbers of the experts that each token chose,
            integers (T, K), before the experts run.
    """

    with contextlib.ExitStack() as hooks:
        for linear in linears:

            def show_input(_module: nn.Module, args: Any, linear: Linear = linear) -> None:
                on_input(linear, args[0])

            hooks.enter_context(linear.module.register_forward_pre_hook(show_input))
        for counter in expert_counters:

            def show_routing(
                _module: nn.Module, args: Any, kwargs: Any, counter: ExpertCounter = counter
            ) -> None:
                on_routing(counter, counter.experts.arguments(args, kwargs)[1])

            handle = counter.experts.register_forward_pre_hook(show_routing, with_kwargs=True)
            hooks.enter_context(handle)
        yield


@contextlib.contextmanager
def output_hooks(
    linears: Sequence[Linear], on_output: Callable[[Linear, Tensor, Tensor], object]
) -> Iterator[None]:
    """While active, call a function after every forward of some linears.

    Args:
        linears: Linears to observe.
        on_output: Called with a linear, its input (…, in) and its output (…, out).
    """
    with contextlib.ExitStack() as hooks:
        for linear in linears:

            def show_output(
                _module: nn.Module, args: Any, output: Tensor, linear: Linear = linear
            ) -> None:
                on_output(linear, args[0], output)

            hooks.enter_context(linear.module.register_forward_hook(show_output))
        yield


#: What the method needs -> an expert with fewer tokens than this loses less when it is pruned by
#: the statistics of all tokens. Norms need few tokens; a Gram matrix of few tokens has no full
#: rank. docs/reference/models.md says how both were measured.
MIN_TOKENS: dict[Needs, int] = {"none": 0, "norms": 32, "gram": 512}


class ExpertCounter:
    """Counts the tokens that choose each expert of one experts module.

    An expert that fewer than `min_tokens` tokens chose is measured on all tokens of the calibration
    set, as if all had chosen it. Its gate and up projections see what the experts module is given,
    its down projection sees what they make of that. The block itself continues with the tokens that
    chose the expert.

    A walk counts tokens while all batches of all processes wait at the experts module. So the
    counts are those of the pruned model.

    Args:
        name: Name of the module, relative to the block.
        experts: The module. `complete` sets its `measured_on_all`, and `reset` empties it.
        min_tokens: An expert with fewer tokens than this is measured on all tokens.
    """

    def __init__(self, name: str, experts: Experts, min_tokens: int) -> None:
        self.name = name
        self.experts = experts
        self.min_tokens = min_tokens
        # Batch of this rank -> tokens per expert, int64 (E,) on the CPU.
        self._by_batch: dict[int, Tensor] = {}
        # Tokens per expert, of all processes; None before `complete`.
        self._tokens_E: list[int] | None = None

    def owns(self, linear: str) -> bool:
        """Whether a linear, by its name relative to the block, belongs to these experts."""
        return linear.startswith(f"{self.name}.")

    def count(self, batch: int, chosen_TK: Tensor) -> None:
        """Count the tokens of one batch by chosen expert.

        A batch that runs again replaces its earlier count.

        Args:
            batch: Number of the batch on this rank.
            chosen_TK: Numbers of the experts that each token chose, integers (T, K).
        """
        numbers = chosen_TK.flatten()
        # Some models use numbers out of range for slots that no expert fills.
        in_range = numbers[(numbers >= 0) & (numbers < self.experts.count)]
        self._by_batch[batch] = torch.bincount(in_range, minlength=self.experts.count).cpu()

    def complete(self) -> None:
        """Add up the counts of all processes, and choose the experts measured on all tokens.

        Every process calls it at once, after all its batches are counted.
        """
        counts_E = sum(self._by_batch.values(), torch.zeros(self.experts.count, dtype=torch.int64))
        self._tokens_E = sum_ints(counts_E.tolist())
        self.experts.measured_on_all = frozenset(
            number for number, tokens in enumerate(self._tokens_E) if tokens < self.min_tokens
        )

    def reset(self) -> None:
        """Let every expert see only the tokens that chose it again."""
        self.experts.measured_on_all = frozenset()

    def notes(self, linear: str) -> dict[str, Any]:
        """The manifest's notes on a linear of these experts, by its name relative to the block.

        `routed_tokens` is the number of tokens that chose the expert. `measured_on` says where the
        rule applied. There are no notes before `complete`.
        """
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
    """A counter for every experts module of a block that owns one of `linears`.

    Args:
        block: The block, in which fused experts are replaced by `Experts`.
        linears: Names of the linears to prune, relative to the block.
        needs: The statistics that the method needs. Without any, there is nothing to decide and
            hence no counter.
        requested: The user's minimum of tokens per expert, in place of that in `MIN_TOKENS`; None
            if the user has none. With 0 there is no counter.
    """
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
