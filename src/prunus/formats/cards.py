"""The README.md of compressed, packed and unpacked checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from prunus.engine.linear_record import calibration_words, grid_words, sparsity_tag
from prunus.engine.record import extended_card, result_card, source_name
from prunus.formats.records import CompressionRecord, unmatched_sentences
from prunus.model.checkpoint.card import add_tags, with_fields

# The title of the section that says how to load a packed model.
_TITLE = "Packed by prunus"
# The section itself. Its last characters mark its end, see `unpacked_card`.
_SECTION = """\
The linears are stored in the packed format (`docs/reference/packed-format.md` of prunus). Install
prunus, then:

```python
import prunus
from transformers import LOADER

model = LOADER.from_pretrained("this folder")
```

`prunus unpack` turns it into an ordinary checkpoint again.
"""


def quantized_card(
    record: CompressionRecord,
    title: str,
    what: str,
    commands: Mapping[str, str],
    *,
    tags: Iterable[str],
    fields: Mapping[str, str | None] | None = None,
    source: Path,
) -> str:
    """The card of a result of compress that needs nothing of prunus.

    Args:
        record: The record of the run.
        title: What was done, in a word or two.
        what: A sentence or two on the result, before its size.
        commands: Name of a program -> the command by which it runs the result.
        tags: Tags for the hub.
        fields: As for `result_card`.
        source: The folder of the source, whose card is extended.
    """
    lines = [f"{command}  # {program}" for program, command in commands.items()]
    return result_card(
        record,
        title,
        [
            f"{source_name(record)} {what}",
            "" if record.size is None else " ".join(record.size.sentences()),
            "\n".join(["```sh", *lines, "```"]),
            f"Calibration: {calibration_words(record)}.",
            grid_words(record.grid_bits),
            " ".join(unmatched_sentences(record.unmatched)),
        ],
        tags=["quantized", *tags],
        relation="quantized",
        fields=fields,
        source=source,
    )


def compressed_card(record: CompressionRecord, loader: str, source: Path) -> str:
    """The card of a packed result of compress: what it is, how it was made, and what loads it.

    Args:
        record: The record of the run.
        loader: The class of transformers that loads the model.
        source: The folder of the source, whose card is extended.
    """
    recipe, totals = record.recipe, record.totals
    sparsity, bits = totals.get("sparsity", 0.0), totals.get("bits", recipe.bits or 0.0)
    origin = "They follow from the rate: these weights did not repay their bits."
    if forced := totals.get("forced_zeros", 0):
        shape = recipe.pattern if recipe.n_of_m else f"{recipe.sparsity:.0%} sparsity"
        origin = (
            f"{forced:,} of them were forced ({shape} by {recipe.method}); the others follow from "
            "the rate."
        )
    size = [] if record.size is None else record.size.sentences()
    method = f"\n  method: {recipe.method}" if recipe.forces_zeros else ""
    card = result_card(
        record,
        "compressed",
        [
            f"{source_name(record)} with {bits:.2f} bits per weight in its linears, scales and all "
            "else counted.",
            " ".join(size),
            f"Zeros: {totals.get('zeros', 0):,} of {totals.get('weights', 0):,} weights "
            f"({sparsity:.2%}). {origin} Calibration: {calibration_words(record)}.",
            grid_words(record.grid_bits),
        ],
        tags=[
            "compressed",
            "quantized",
            f"{round(recipe.bits or bits, 1):g}-bit",
            "sparse",
            sparsity_tag(sparsity),
        ],
        relation="quantized",
        fields={
            "prunus": f"{method}\n  sparsity: {sparsity:.4f}\n  bits: {bits:.3f}",
        },
        source=source,
    )
    return packed_card(card, loader)


def packed_card(readme: str | None, loader: str = "AutoModelForCausalLM") -> str:
    """The card of a source with how to load it packed, for which transformers needs prunus.

    Args:
        readme: The README.md of the source; None if it has none.
        loader: The class of transformers that loads the model.
    """
    section, tags = _SECTION.replace("LOADER", loader), ["prunus", "packed"]
    card = extended_card(readme, _TITLE, section, name="A packed model", tags=tags)
    return with_fields(card, {"library_name": "prunus"})


def unpacked_card(readme: str | None) -> str:
    """The card of a packed checkpoint without what `packed_card` added.

    Args:
        readme: Its README.md; None if it has none.
    """
    before, _, after = (readme or "# An unpacked model\n").partition(f"\n## {_TITLE}\n")
    text = before + after.partition(_SECTION[-20:])[2]
    return with_fields(add_tags(text, [], ["packed"]), {"library_name": "transformers"})
