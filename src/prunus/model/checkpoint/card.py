"""Model cards: the README.md of a checkpoint, whose first lines are fields that the hub reads.

Those lines, the front matter, are YAML between two lines of three dashes. Here a field is kept as
the text that the card has for it, so that fields which prunus does not know stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from prunus.model.checkpoint.regular_files import read_card

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
        if (found := _FIELD.match(line)) is not None:
            name = found[1]
            fields[name] = found[2].rstrip()
        elif name is not None:
            fields[name] += f"\n{line.rstrip()}"
    return fields, "\n".join(lines[end + 1 :]) + "\n"


def values_of(card: str | None) -> dict[str, Any]:
    r"""Return the values of a card's fields: text, lists and mappings; none if they are no YAML.

    Nothing is taken for a number, a date or a truth. The language of Norway is "no".

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


def add_tags(card: str, tags: Iterable[str], without: Iterable[str] = ()) -> str:
    r"""Return a card that has tags as well, and no longer has those in `without`.

    >>> add_tags("---\ntags: [a]\n---\n\n# Title\n", ["b"], without=["a"])
    '---\ntags: [b]\n---\n\n# Title\n'
    """
    present = values_of(card).get("tags") or []
    present = [present] if isinstance(present, str) else present
    present = [tag for tag in present if isinstance(tag, str)]
    kept = [tag for tag in dict.fromkeys([*present, *tags]) if tag not in set(without)]
    text = yaml.safe_dump(kept, allow_unicode=True, default_flow_style=True, width=2**20)
    return with_fields(card, {"tags": text if kept else None})


def inherited_fields(folder: Path | None) -> dict[str, str]:
    """Origin, licence, language and task of a model, as its card has them, for that of a result.

    The base models are those that the model has itself. A result of a model on the hub has that
    model in their place.
    """
    if folder is None:
        return {}
    fields = read_fields(read_card(folder / "README.md"))[0]
    return {name: fields[name] for name in _INHERITED if name in fields}


def base_model(source: str, folder: Path | None = None) -> str | None:
    """The hub id of a model, for the field `base_model`; None where it has none.

    The hub refuses cards whose base is no hub id. A folder may lie where the id of a cached model
    says (`…/models--owner--name/snapshots/…`).

    >>> base_model("HuggingFaceTB/SmolLM2-135M")
    'HuggingFaceTB/SmolLM2-135M'
    """
    if _HUB_ID.fullmatch(source) and not Path(source).exists():
        return source
    for part in (folder or Path(source)).parts:
        found = part.removeprefix("models--").replace("--", "/")
        if part.startswith("models--") and _HUB_ID.fullmatch(found):
            return found
    return None
