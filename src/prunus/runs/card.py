"""The model card of a result, README.md: what it is, how it was made, and what loads it.

The first lines of a card are fields for the hub: the model that the result was made from, if that
is on the hub, the library that loads it, tags, and the license of the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from prunus.model.checkpoint.card import add_tags, base_model, inherited_fields, with_fields
from prunus.runs.record import RunRecord


def source_name(record: RunRecord) -> str:
    """The name of the model that a result was made from, without the folders above it."""
    return Path(record.source).name or record.source


def result_card(
    record: RunRecord,
    title: str,
    paragraphs: Iterable[str],
    *,
    tags: Iterable[str],
    fields: Mapping[str, str | None] | None = None,
    source: Path | None = None,
) -> str:
    """The card of a model that a run has made.

    Args:
        fields: Further fields, as YAML; None leaves one out.
    """
    body = "\n\n".join(
        [
            f"# {source_name(record)}, {title}",
            *paragraphs,
            f"All figures are in `{record.FILE}`.",
            f"```toml\n{record.recipe.to_toml().rstrip()}\n```",
        ]
    )
    known = {
        **inherited_fields(source),
        "base_model": base_model(record.source, source),
        "library_name": "transformers",
        "tags": f"[{', '.join(['prunus', *tags])}]",
    }
    return with_fields(f"{body}\n", known | dict(fields or {}))


def extended_card(
    card: str | None,
    title: str,
    section: str,
    *,
    name: str,
    tags: Iterable[str] = (),
    without: Iterable[str] = (),
) -> str:
    """The card of a model with a section about what was done to it afterwards.

    A section with the same title, and all that follows it, is replaced.

    Args:
        card: Of the model, or None.
    """
    before = (card if card is not None else f"# {name}\n").split(f"## {title}\n")[0].rstrip()
    return add_tags(f"{before}\n\n## {title}\n\n{section.rstrip()}\n", tags, without)
