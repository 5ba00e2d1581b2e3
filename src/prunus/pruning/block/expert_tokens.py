"""How many calibration tokens chose each expert, and what is done where these are too few.

The rule: an expert that fewer than the minimum of tokens chose is measured as if all tokens of the calibration set had
chosen it, its gate and up on what the experts are given, its down on what they make of that. What the block goes on
with are the chosen tokens alone. Tokens are counted at the moment when all batches of all ranks stand before the
experts, so the counts are those of the pruned model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prunus.distributed import Ranks
from prunus.methods.statistics import Needs
from prunus.model.experts import Experts

__all__ = ["MIN_TOKENS", "ExpertCounter", "find_expert_counters", "min_tokens"]

#: Below so many tokens of its own an expert's linears lose less when they are pruned by those of all: measured, see
#: docs/zoo.md. Norms are known soon; a Gram matrix of few tokens has no full rank.
MIN_TOKENS: dict[Needs, int] = {"none": 0, "norms": 32, "gram": 512}


def min_tokens(needs: Needs, wanted: int | None) -> int:
    """The minimum of tokens for a method that needs these statistics: as it is wanted, or by measurement."""
    return 0 if needs == "none" else MIN_TOKENS[needs] if wanted is None else wanted


class ExpertCounter:
    """The way to one experts module of a block.

    Args:
        name: of the module, relative to the block.
        experts: it.
        minimum: tokens below which an expert is measured on all of them.
    """

    def __init__(self, name: str, experts: Experts, minimum: int) -> None:
        self.name = name
        self.experts = experts
        self.minimum = minimum
        self._by_batch: dict[int, Tensor] = {}
        self.tokens_E: list[int] | None = None

    def owns(self, linear: str) -> bool:
        """Whether a linear, by its name relative to the block, is one of these experts'."""
        return linear.startswith(f"{self.name}.")

    def see(self, batch: int, chosen_TK: Tensor) -> None:
        """Count the tokens of one batch; `chosen_TK` holds the numbers of their experts."""
        chosen = chosen_TK.flatten()
        known = chosen[(chosen >= 0) & (chosen < self.experts.count)]
        self._by_batch[batch] = torch.bincount(known, minlength=self.experts.count).cpu()

    def decide(self, ranks: Ranks) -> None:
        """Once all batches were seen, on all ranks at once: who is measured on all tokens."""
        mine_E = sum(self._by_batch.values(), torch.zeros(self.experts.count, dtype=torch.int64))
        self.tokens_E = [
            sum(each) for each in zip(*ranks.gather_ints(mine_E.tolist()), strict=True)
        ]
        self.experts.measured_on_all = frozenset(
            number for number, tokens in enumerate(self.tokens_E) if tokens < self.minimum
        )

    def end(self) -> None:
        """From here on experts see the tokens that chose them only."""
        self.experts.measured_on_all = frozenset()

    def notes(self, linear: str) -> dict[str, Any]:
        """What the manifest says of a linear of these experts."""
        if self.tokens_E is None:
            return {}
        tokens = self.tokens_E[int(linear.removeprefix(f"{self.name}.").partition(".")[0])]
        if tokens >= self.minimum:
            return {"routed_tokens": tokens}
        return {
            "routed_tokens": tokens,
            "measured_on": f"all tokens of the block: fewer than {self.minimum} chose this expert",
        }


def find_expert_counters(
    block: nn.Module, linears: Iterable[str], minimum: int
) -> list[ExpertCounter]:
    """The experts modules of a block that own any of `linears` (relative names); none where the minimum is 0."""
    if minimum == 0:
        return []
    names = list(linears)
    found = [
        ExpertCounter(name, each, minimum)
        for name, each in block.named_modules()
        if isinstance(each, Experts)
    ]
    return [
        expert_counter
        for expert_counter in found
        if any(expert_counter.owns(name) for name in names)
    ]
