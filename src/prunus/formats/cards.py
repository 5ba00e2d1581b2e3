"""The README.md of compressed checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from prunus.engine.linear_record import calibration_words
from prunus.engine.record import result_card, source_name
from prunus.formats.records import CompressionRecord, unmatched_sentences


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
            " ".join(unmatched_sentences(record.unmatched)),
        ],
        tags=["quantized", *tags],
        relation="quantized",
        fields=fields,
        source=source,
    )
