"""What prune did to a checkpoint: `prunus.json` for programs, the model card for readers.

Imports no torch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

from prunus.engine.linear_record import LinearsRecord, calibration_words
from prunus.engine.run_record import result_card, source_name
from prunus.methods.allocation import ALLOCATION_NAMES, shares_by_hand
from prunus.pruning.recipe import Recipe
from prunus.words import counted

# A sparsity that differs less than this from the one that was asked for is the same for people.
_SAME_SPARSITY = 0.0005


class Manifest(LinearsRecord):
    """The record of prune, which is also the file `prunus.json`.

    Attributes:
        recipe: The options of prune that decide the bytes of the result.
    """

    FILE: ClassVar[str] = "prunus.json"
    COMMAND: ClassVar[str] = "prunus prune"

    recipe: Recipe

    @property
    def what(self) -> str:
        """The method."""
        return self.method_name or self.recipe.method

    def summary(self) -> dict[str, Any]:
        """See `LinearsRecord.summary`. `sparsity` is the earlier name of that of pruned linears."""
        totals = super().summary()
        return totals | {"sparsity_of_pruned_linears": totals["sparsity"]}

    @property
    def asked_sparsity(self) -> float:
        """The recipe's sparsity, or what was reached if the user gives every linear its own."""
        recipe = self.recipe
        own = recipe.sparsity_of or recipe.allocation not in ALLOCATION_NAMES.known
        return self.summary()["sparsity"] if own and self.blocks else recipe.sparsity

    @property
    def shape(self) -> str:
        """What was asked for in words, such as "2:4" or "50% unstructured"."""
        recipe = self.recipe
        if recipe.masks is not None:
            return "given"
        return recipe.pattern if recipe.n_of_m else f"{self.asked_sparsity:.0%} unstructured"

    def misses(self, reached: float) -> bool:
        """Whether people would see that this sparsity is not the one that was asked for."""
        return self.recipe.masks is None and abs(reached - self.asked_sparsity) >= _SAME_SPARSITY

    def _by_hand(self) -> list[str]:
        """Each sparsity that was given by hand, and the linears that have it."""
        blocks = [
            {f"{block.name}.{name}": x for name, x in block.linears.items()}
            for block in self.blocks
        ]
        linears = {name: x for block in blocks for name, x in block.items()}
        heads = self.allocation.keys() - linears.keys() if self.head else set[str]()
        linears |= {name: self.head for name in heads if self.head}
        weights = {name: math.prod(x.shape) for name, x in linears.items()}
        shares = shares_by_hand(
            self.recipe.sparsity_of,
            [{name: weights[name] for name in block} for block in blocks],
            self.recipe.sparsity,
            outside={name: weights[name] for name in heads},
        )
        lines = []
        for share in shares:
            count = counted(len(share.weights), "linear")
            zeros = sum(linears[x].zeros for x in share.weights) / sum(share.weights.values())
            lines.append(
                f"{share.rule}: {share.sparsity:.2%} asked for in {count}, {zeros:.2%} zeros"
            )
        return lines

    def _notes(self, totals: dict[str, Any]) -> list[str]:
        lines, asked, reached = super()._notes(totals), self.asked_sparsity, totals["sparsity"]
        if self.state == "finished" and self.recipe.sparsity_of:
            lines += self._by_hand()
        if self.state != "finished" or not self.misses(reached):
            return lines
        if reached < asked:
            why = "a share of the weights that compete is rounded down to a whole number"
        elif totals["zeros_before"]:
            why = "zeros of the model that the mask did not choose are still zeros"
        elif self.recipe.method == "magnitude":
            why = "weights as large as the threshold are removed together, as in the original code"
        else:
            why = "weights that an update or a training made very small are rounded to 0"
        return [*lines, f"sparsity {reached:.2%}, where {asked:.2%} was asked for: {why}"]


def pruned_card(
    manifest: Manifest,
    loader: str = "AutoModelForCausalLM",
    source: Path | None = None,
    nbytes: int | None = None,
) -> str:
    """The model card: what the checkpoint is, how it was made, and what loads it.

    Args:
        manifest: The record of the run.
        loader: The class of transformers that loads the model.
        source: The folder of the source, whose card has fields that hold for the result as well;
            None for a loaded model.
        nbytes: Bytes of the files with weights; None where there are no files.
    """
    totals = manifest.all_totals()
    sparsity, of_all = totals["sparsity"], totals.get("sparsity_of_all_linears")
    in_all, field = "", ""
    if of_all is not None:
        in_all = f" Of all linears in the blocks, {of_all:.2%} of the weights are zero."
        field = f"\n  sparsity_of_all_linears: {of_all:.4f}"
    return result_card(
        manifest,
        "pruned",
        [
            f"{source_name(manifest)} with {manifest.shape} sparsity by {manifest.what}. Shapes, "
            "tokenizer and configuration are the source's: it loads with "
            f"`{loader}.from_pretrained` and is used like the dense model.",
            f"Weights removed: {totals.get('zeros', 0):,} of {totals.get('weights', 0):,} in the "
            f"pruned linears ({sparsity:.2%}).{in_all} Calibration: {calibration_words(manifest)}.",
        ],
        tags=["pruned", "sparse", f"sparsity-{100 * sparsity:.0f}"],
        nbytes=nbytes,
        fields={"prunus": f"\n  method: {manifest.what}\n  sparsity: {sparsity:.4f}{field}"},
        source=source,
    )
