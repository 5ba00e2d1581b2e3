"""Where a model comes from: the fields of a GGUF file as a model card, and a card as fields.

Licence, author, languages and base models stand in both. llama.cpp's package makes fields of the
values of a card that are listed here. Cards and files are those of strangers, so only text is taken
over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from prunus.formats.gguf.file import GgufFile
from prunus.formats.gguf.package import package
from prunus.model.checkpoint.card import base_model, values_of
from prunus.model.checkpoint.files import read_card, read_json

#: Field of a card -> field `general.…` of a GGUF file.
_FIELDS = {
    "name": "name",
    "author": "author",
    "version": "version",
    "organization": "organization",
    "finetune": "finetune",
    "basename": "basename",
    "description": "description",
    "size_label": "size_label",
    "license": "license",
    "license_name": "license.name",
    "license_link": "license.link",
    "url": "source.url",
    "doi": "source.doi",
    "uuid": "source.uuid",
    "repo_url": "source.repo_url",
    "tags": "tags",
    "language": "languages",
}
# A file says how many base models it has. Look at this many at most, whatever it says.
_MOST_BASES = 64
#: Fields of a card that may have several values.
_LISTS = {
    "license", "tags", "pipeline_tag", "language", "languages", "base_model", "base_models",
    "datasets", "dataset", "dataset_sources",
}  # fmt: skip


def imported_card(file: GgufFile, name: str) -> str:
    """The card of the checkpoint that was imported from the GGUF file `name`.

    It has the facts of `_FIELDS` that the file states, and in `prunus` what the file was.
    """
    stated = {field: file.get(f"general.{key}") for field, key in _FIELDS.items()}
    urls = [str(file.get(f"general.base_model.{x}.repo_url", "")) for x in range(_MOST_BASES)]
    bases = [base_model(url.removeprefix("https://huggingface.co/")) for url in urls if url]
    stated["base_model"] = [*filter(None, bases)] or None
    values = {field: value for field, value in stated.items() if _is_fact(field, value)}
    values["prunus"] = {"imported_from": name, "gguf_types": file.types}
    types = ", ".join(f"{share:.1%} {kind}" for kind, share in file.types.items())
    return (
        f"---\n{yaml.safe_dump(values, allow_unicode=True, sort_keys=False)}---\n\n"
        f"# {values.get('name', name)}\n\nImported by prunus from the GGUF file `{name}`. Its "
        f"weights were stored as {types}, and are unpacked here. Weights in few bits were rounded "
        "before: formats of as many bits look better on them than on ordinary weights.\n"
    )


def _is_fact(name: str, value: Any) -> bool:
    """Whether the value of a field of a card is text that llama.cpp's package can take."""
    if name not in _LISTS:
        return isinstance(value, str) and value != ""
    parts = value if isinstance(value, list) else [value]
    texts = [text for x in parts for text in (x.values() if isinstance(x, dict) else [x])]
    return bool(texts) and all(isinstance(text, str) for text in texts)


def metadata_of(folder: Path, parameters: int) -> Any:
    """The package's `Metadata` of a checkpoint, from its card, its configuration and its name.

    A folder of the hub's cache has the name of its model. Values that are not text are left out.

    Args:
        folder: The checkpoint.
        parameters: Number of its parameters, from which the package makes a label such as 7B.
    """
    folder, kind = folder.resolve(), package().Metadata
    card = {
        field: value
        for field, value in values_of(read_card(folder / "README.md")).items()
        if _is_fact(field, value)
    }
    hub = base_model("", folder)
    config = {"_name_or_path": hub} if hub else read_json(folder / "config.json")
    named = None if hub else folder
    # As `Metadata.load` does, but for cards that are no YAML, which it fails for.
    metadata = kind.apply_metadata_heuristic(kind(), card, config, named, parameters)
    sampling = folder / "generation_config.json"
    # Earlier versions of the package write none of them.
    for option, value in (read_json(sampling) if sampling.is_file() else {}).items():
        setattr(metadata, f"sampling_{'temp' if option == 'temperature' else option}", value)
    metadata.name = metadata.name or folder.name
    return metadata
