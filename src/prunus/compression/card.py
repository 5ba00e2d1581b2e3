"""The README.md of a compressed checkpoint."""

from __future__ import annotations

from pathlib import Path

from prunus.compression.record import CompressionRecord
from prunus.packed.card import packed_card
from prunus.pruning.card import calibration_words, sparsity_tag
from prunus.runs.card import result_card, source_name

__all__ = ["compressed_card"]


def compressed_card(record: CompressionRecord, loader: str, source: Path) -> str:
    """What the checkpoint is, how it was made, and what loads it."""
    recipe, totals = record.recipe, record.totals
    sparsity, bits = totals.get("sparsity", 0.0), totals.get("bits", recipe.bits)
    origin = "They follow from the rate: these weights did not repay their bits."
    if forced := totals.get("forced_zeros", 0):
        shape = recipe.pattern if recipe.n_of_m else f"{recipe.sparsity:.0%} sparsity"
        origin = (
            f"{forced:,} of them were forced ({shape} by {recipe.method}); the others follow from "
            "the rate."
        )
    head = ""
    if recipe.head_bits is not None:
        head = f" Embeddings and output head: {recipe.head_bits} bits per weight."
    card = result_card(
        record,
        "compressed",
        [
            f"{source_name(record)} with {bits:.2f} bits per weight in its linears, scales and all "
            f"else counted.{head}",
            f"Zeros: {totals.get('zeros', 0):,} of {totals.get('weights', 0):,} weights "
            f"({sparsity:.2%}). {origin} Calibration: {calibration_words(record)}.",
        ],
        tags=["compressed", "quantized", f"{recipe.bits:g}-bit", "sparse", sparsity_tag(sparsity)],
        fields={
            "base_model_relation": "quantized",
            "prunus": f"\n  method: {recipe.method}\n  sparsity: {sparsity:.4f}"
            f"\n  bits: {bits:.3f}",
        },
        source=source,
    )
    return packed_card(card, loader)
