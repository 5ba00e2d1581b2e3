"""The README.md of a pruned checkpoint."""

from __future__ import annotations

from pathlib import Path

from prunus.pruning.manifest import Manifest, PruningRecord
from prunus.runs.card import result_card, source_name
from prunus.runs.record import bos_words


def pruned_card(
    manifest: Manifest, loader: str = "AutoModelForCausalLM", source: Path | None = None
) -> str:
    """What the checkpoint is, how it was made, and what loads it."""
    recipe, totals = manifest.recipe, manifest.totals
    sparsity = totals.get("sparsity", 0.0)
    shape = recipe.pattern if recipe.n_of_m else f"{recipe.sparsity:.0%} unstructured"
    return result_card(
        manifest,
        "pruned",
        [
            f"{source_name(manifest)} with {shape} sparsity by {recipe.method}. Shapes, tokenizer "
            f"and configuration are the source's: it loads with `{loader}.from_pretrained` and is "
            "used like the dense model.",
            f"Weights removed: {totals.get('zeros', 0):,} of {totals.get('weights', 0):,} in the "
            f"pruned linears ({sparsity:.2%}). Calibration: {calibration_words(manifest)}.",
        ],
        tags=["pruned", "sparse", sparsity_tag(sparsity)],
        fields={"prunus": f"\n  method: {recipe.method}\n  sparsity: {sparsity:.4f}"},
        source=source,
    )


def calibration_words(record: PruningRecord) -> str:
    """Where the calibration windows were taken from."""
    return f"{record.inputs.calibration}, {bos_words(record.inputs.bos)}"


def sparsity_tag(sparsity: float) -> str:
    """The tag of a sparsity.

    >>> sparsity_tag(0.5)
    'sparsity-50'
    """
    return f"sparsity-{sparsity:.0%}".removesuffix("%")
