"""Model cards: the README.md of a checkpoint, whose first lines are fields that the hub reads.

Those lines, the front matter, are YAML between two lines of three dashes. Here a field is kept as
the text that the card has for it, so that fields which prunus does not know stay as they are.

The functions at the end save the card and the record of a loaded model with it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prunus.model.checkpoint.files import read_card, read_json, write_text

#: The files that go with a model when it is saved again: its card, and one of these records.
_CARD, _MANIFESTS = "README.md", ("prunus.json", "prunus-compress.json")
_FENCE = "---"
_FIELD = re.compile(r"^([A-Za-z_][A-Za-z0-9_-]*):(.*)$")
#: A model on the hub: owner and name.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
#: What holds for a model holds for what was made from it.
_INHERITED = (
    "license", "license_name", "license_link", "language", "pipeline_tag", "author", "organization",
    "base_model", "base_model_relation",
)  # fmt: skip


def read_fields(card: str | None) -> tuple[dict[str, str], str]:
    r"""Return the fields of a card as text, and what follows them.

    The text of a field is all that stands after its colon, with the lines below that belong to it.
    A card without front matter has no fields. None is an empty card.

    >>> read_fields("---\nlicense: mit\ntags:\n- a\n---\n\n# Title\n")
    ({'license': ' mit', 'tags': '\n- a'}, '\n# Title\n')
    """
    lines = (card or "").splitlines()
    if not lines or lines[0].rstrip() != _FENCE or _FENCE not in lines[1:]:
        return {}, card or ""
    end = lines.index(_FENCE, 1)
    fields: dict[str, str] = {}
    name = None
    for line in lines[1:end]:
        if (field := _FIELD.match(line)) is not None:
            name = field[1]
            fields[name] = field[2].rstrip()
        elif name is not None:
            fields[name] += f"\n{line.rstrip()}"
    return fields, "\n".join(lines[end + 1 :]) + "\n"


def values_of(card: str | None) -> dict[str, Any]:
    r"""Return the values of a card's fields: text, lists and mappings; none if they are no YAML.

    Every scalar stays text: YAML would take "no", the language of Norway, for false, and the
    version 1.0 for a number.

    >>> values_of("---\nlanguage: [no, en]\nversion: 1.0\n---\n")
    {'language': ['no', 'en'], 'version': '1.0'}
    """
    text = "".join(f"{name}:{value}\n" for name, value in read_fields(card)[0].items())
    try:
        values = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def with_fields(card: str, changes: Mapping[str, str | None]) -> str:
    r"""Return a card with other fields; None removes a field.

    Fields that change move behind the others, in the order of `changes`. A value that begins with a
    line break is a list or mapping of several lines.

    >>> with_fields("# Title\n", {"license": "mit"})
    '---\nlicense: mit\n---\n\n# Title\n'
    """
    fields, body = read_fields(card)
    for name, value in changes.items():
        fields.pop(name, None)
        if value is not None:
            fields[name] = value if value.startswith("\n") else f" {value.strip()}"
    if not fields:
        return body.lstrip()
    head = "".join(f"{name}:{value}\n" for name, value in fields.items())
    return f"{_FENCE}\n{head}{_FENCE}\n\n{body.lstrip()}"


def inherited_fields(folder: Path | None) -> dict[str, str]:
    """Fields of a model's card that a result takes over, such as licence and language, as text.

    The base models are those that the model has itself. For a model on the hub, the caller puts
    that model in their place; see `base_model`.

    Args:
        folder: The folder of the model; None, or one without a card, gives no fields.
    """
    if folder is None:
        return {}
    fields = read_fields(read_card(folder / _CARD))[0]
    return {name: fields[name] for name in _INHERITED if name in fields}


def base_model(source: str, folder: Path | None = None) -> str | None:
    """The hub id of a model, for the field `base_model`; None where it has none.

    The hub refuses cards whose base is no hub id.

    Args:
        source: The model as the user names it: a hub id, or a path.
        folder: Where its files are. A folder of the hub's cache has the id in its path
            (`…/models--owner--name/snapshots/…`). None looks at the path `source`.

    >>> base_model("HuggingFaceTB/SmolLM2-135M")
    'HuggingFaceTB/SmolLM2-135M'
    """
    if _HUB_ID.fullmatch(source) and not Path(source).exists():
        return source
    for part in (folder or Path(source)).parts:
        hub_id = part.removeprefix("models--").replace("--", "/")
        if part.startswith("models--") and _HUB_ID.fullmatch(hub_id):
            return hub_id
    return None


# --- the card and the record of a loaded model ---

# transformers saves weights and configuration alone. So models that prunus loads or prunes get a
# `save_pretrained` of their own.


def records_of(folder: Path) -> dict[str, str]:
    """Name -> text of the card and the record that lie in a folder; empty if prunus wrote none."""
    name = next((file for file in _MANIFESTS if (folder / file).is_file()), None)
    if name is None:
        return {}
    card = read_card(folder / _CARD)
    return {name: manifest_text(read_json(folder / name))} | ({} if card is None else {_CARD: card})


def manifest_text(content: Any) -> str:
    """A record as the text of a file, without the SHA-256 of shards.

    The record goes next to other shards than those whose bytes it names.
    """
    named = content | {"sha256": {}} if isinstance(content, dict) else content
    return json.dumps(named, indent=2) + "\n"


def keep_records(model: Any, records: Mapping[str, str]) -> None:
    """Let a transformers model write records next to its weights, wherever it is saved.

    Args:
        model: The model, which gets a `save_pretrained` of its own.
        records: Name of a file -> its text. Without any, the model stays as it is.
    """
    if records:
        # A partial function, because it is copied and pickled with the model.
        model.save_pretrained = functools.partial(_save_pretrained, model, dict(records))


def _save_pretrained(
    model: Any,
    records: Mapping[str, str],
    save_directory: str | Path,
    is_main_process: bool = True,
    **options: Any,
) -> None:
    """As `save_pretrained` of transformers, with the card and the record next to the weights."""
    type(model).save_pretrained(model, save_directory, is_main_process, **options)
    if is_main_process:
        for name, text in records.items():
            write_text(Path(save_directory) / name, text)
