"""The README.md of a pruned checkpoint."""

from __future__ import annotations

from pathlib import Path

from prunus.model.checkpoint.card import base_model, inherited_fields, with_fields
from prunus.pruning.manifest import MANIFEST_NAME, Manifest
from prunus.pruning.records import bos_words

__all__ = ["model_card"]


def model_card(
    manifest: Manifest, loader: str = "AutoModelForCausalLM", source: Path | None = None
) -> str:
    """What the checkpoint is, how it was made, and what loads it.

    Fields at its head are for the hub: the model that it was made from, if that is on the hub, the
    library that loads it, tags, and the license of the source.

    Args:
        manifest: Of the finished run.
        loader: The class of transformers that loads the model.
        source: Folder of the model that was pruned, if there is one.
    """
    compressed = manifest.recipe.bits is not None
    card = _compressed_card(manifest) if compressed else _pruned_card(manifest, loader)
    return with_fields(card, _fields(manifest, source))


def _fields(manifest: Manifest, source: Path | None) -> dict[str, str | None]:
    """The fields of the card, as YAML."""
    totals, bits = manifest.totals, manifest.recipe.bits
    sparsity = totals.get("sparsity", 0.0)
    made = ["pruned"] if bits is None else ["compressed", "quantized", f"{bits:g}-bit"]
    tags = ["prunus", *made, "sparse", f"sparsity-{sparsity:.0%}".removesuffix("%")]
    figures = f"\n  method: {manifest.recipe.method}\n  sparsity: {sparsity:.4f}"
    if bits is not None:
        figures += f"\n  bits: {totals.get('bits', bits):.3f}"
    return {
        **inherited_fields(source),
        "base_model": base_model(manifest.source, source),
        "base_model_relation": None if bits is None else "quantized",
        # The hub shows how to load a model by its library. What is merely pruned needs none of
        # ours; packed checkpoints do, see `add_packed_card`.
        "library_name": "transformers",
        "tags": f"[{', '.join(tags)}]",
        "prunus": figures,
    }


def _pruned_card(manifest: Manifest, loader: str) -> str:
    recipe, totals = manifest.recipe, manifest.totals
    shape = recipe.pattern if recipe.n_of_m else f"{recipe.sparsity:.0%} unstructured"
    name = Path(manifest.source).name or manifest.source
    return f"""# {name}, pruned

{name} with {shape} sparsity by {recipe.method}. \
Shapes, tokenizer and configuration are the source's:
it loads with `{loader}.from_pretrained` and is used like the dense model.

Weights removed: {totals.get("zeros", 0):,} of {totals.get("weights", 0):,} in the pruned linears
({totals.get("sparsity", 0):.2%}). Calibration: {_calibration(manifest)}. \
Per-linear figures are in
`{MANIFEST_NAME}`.

```toml
{recipe.to_toml().rstrip()}
```
"""


def _calibration(manifest: Manifest) -> str:
    return f"{manifest.inputs.calibration}, {bos_words(manifest.inputs.bos)}"


def _compressed_card(manifest: Manifest) -> str:
    """The same for a compressed checkpoint, up to what loads it."""
    recipe, totals = manifest.recipe, manifest.totals
    name = Path(manifest.source).name or manifest.source
    zeros, forced = totals.get("zeros", 0), totals.get("forced_zeros", 0)
    weights = totals.get("weights", 0)
    origin = "They follow from the rate: these weights did not repay their bits."
    if forced:
        shape = recipe.pattern if recipe.n_of_m else f"{recipe.sparsity:.0%} sparsity"
        origin = (
            f"{forced:,} of them were forced ({shape} by {recipe.method}); the others follow from "
            "the rate."
        )
    head = ""
    if recipe.head_bits is not None:
        head = f" Embeddings and output head: {recipe.head_bits} bits per weight."
    return f"""# {name}, compressed

{name} with {totals.get("bits", 0):.2f} bits per weight in its linears, scales and all else \
counted.{head}

Zeros: {zeros:,} of {weights:,} weights ({totals.get("sparsity", 0):.2%}).
{origin}
Calibration: {_calibration(manifest)}. Per-linear figures are in `{MANIFEST_NAME}`.

```toml
{recipe.to_toml().rstrip()}
```
"""
