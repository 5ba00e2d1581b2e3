"""The README.md of compressed checkpoints, and the commands that run them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prunus.engine.linear_record import calibration_words
from prunus.engine.run_record import extended_card, result_card, source_name
from prunus.model.formats import format_of
from prunus.rounding.compression_record import CompressionRecord, unmatched_sentences

#: What a card says of the loss as long as nobody has measured it.
_UNMEASURED = re.compile(r"^`prunus eval .*` measures how far its predictions are .*$", re.M)


@dataclass(frozen=True)
class CardWords:
    """What a card says of the format of a result.

    Attributes:
        what: A sentence or two on the result, before its size. `{bits}` stands for the bits per
            weight of its linears.
        programs: Name of a program -> the command that runs the result; see `Codec.PROGRAMS`.
        tags: Tags for the hub.
        title: What was done, in a word or two.
        fields: As for `result_card`.
        path: The result, or what stands for it.
    """

    what: str
    programs: Mapping[str, str]
    tags: Sequence[str]
    title: str = "compressed"
    fields: Mapping[str, str | None] = field(default_factory=dict)
    path: Path = Path("FOLDER")


def commands(programs: Mapping[str, str], path: Path) -> dict[str, str]:
    """Name of a program -> the command by which it runs a result, ready to be copied.

    Args:
        programs: `PROGRAMS` of a codec, with its `UPLOADS` or without.
        path: The result, or what stands for it.
    """
    name = path.with_suffix("").name if format_of(path) else path.name
    values = {"OUT": str(path), "BASE": str(path.with_name(name)), "NAME": name.lower()}
    return {
        program: re.sub("OUT|BASE|NAME", lambda part: shlex.quote(values[part[0]]), command)
        for program, command in programs.items()
    }


def quantized_card(record: CompressionRecord, words: CardWords, source: Path, lossless: str) -> str:
    """The card of a result of compress that needs nothing of prunus.

    Args:
        record: The record of the run.
        words: What it says of the format.
        source: The folder of the source, whose card is extended.
        lossless: Which linears of the source lie on the grid of a type; empty if none do.
    """
    programs = commands(words.programs, words.path)
    lines = [f"{command}  # {program}" for program, command in programs.items()]
    lacks = record.unmatched.get("the checkpoint", [])
    uncompared = {x: names for x, names in record.unmatched.items() if x == "config.json"}
    bits = f"{record.totals.get('bits', 0.0):.2f}"
    return result_card(
        record,
        words.title,
        [
            f"{source_name(record)} {words.what.format(bits=bits)}",
            "" if record.size is None else " ".join(record.size.sentences()),
            f"Of the linears of the original, {lossless}." if lossless else "",
            "\n".join(["```sh", *lines, "```"]),
            f"Calibration: {calibration_words(record)}.",
            f"`prunus eval {words.path} --reference {source_name(record)} --perplexity "
            "wikitext2,python-code` measures how far its predictions are from the original's.",
            f"Parts of the original that it lacks: {', '.join(lacks)}." if lacks else "",
            *unmatched_sentences(uncompared),
        ],
        tags=["quantized", *words.tags],
        relation="quantized",
        fields=words.fields,
        source=source,
    )


def checked_card(card: str | None, record: CompressionRecord, name: str) -> str:
    """The card with what a check found, in place of the command that would measure it.

    Args:
        card: The card before; None if there is none.
        record: The record with the figures.
        name: Name of the model, for the heading of a new card.
    """
    found = "\n\n".join(record.check_sentences())
    checked, count = _UNMEASURED.subn(lambda _: found, card or "")
    # Somebody may have written the card anew.
    return checked if count else extended_card(card, "Checked", found, name=name)
