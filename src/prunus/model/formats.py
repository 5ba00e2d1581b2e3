"""Formats of models beside the checkpoint: what tells them apart, and who opens them.

The formats are a room above this one. Their table, `formats/table.py`, enters them here as soon as
`prunus` is imported, so whoever opens a model can ask. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prunus.model.checkpoint.files import read_json


class FormatEntry(NamedTuple):
    """How a format is known.

    Attributes:
        name: What `--format` takes.
        load_codec: Imports the class of the format, which derives from `formats.codec.Codec`, when
            a run needs it, or when a path has the format's suffix.
        suffix: The end of the name of an output that implies the format, in small letters. A model
            with such a name is opened by the class. Empty for a folder.
        key: The key of config.json that a folder of the format has. Such a folder is opened by the
            class, if it `owns` the folder. Empty for a file, and for a folder that is read as a
            checkpoint; see `checkpoint/quantized.py`.
    """

    name: str
    load_codec: Callable[[], Any]
    suffix: str = ""
    key: str = ""


#: All formats, in the order of the help; see `formats/table.py`.
FORMATS: list[FormatEntry] = []
#: What to do with a packed model: the end of a sentence.
PACKED = (
    "prunus before 0.4 made it, and this version does not read it. `prunus unpack` of version 0.3 "
    "turns it back into a plain checkpoint"
)


def suffixes() -> list[str]:
    """The suffixes of all formats that have one."""
    return [entry.suffix for entry in FORMATS if entry.suffix]


def folder_formats() -> list[str]:
    """The names of the formats whose result is a folder. The others follow from the output.

    >>> folder_formats()
    ['compressed-tensors', 'mlx']
    """
    return [entry.name for entry in FORMATS if not entry.suffix]


def format_named(name: str) -> FormatEntry:
    """The format of this name, which must be in the table."""
    return next(entry for entry in FORMATS if entry.name == name)


def format_of(path: str | Path) -> FormatEntry | None:
    """The format that the suffix of a path names, in small or capital letters; None for none.

    >>> format_of("model.GGUF").name, format_of("owner/model")
    ('gguf', None)
    """
    name = str(path).lower()
    return next((entry for entry in FORMATS if entry.suffix and name.endswith(entry.suffix)), None)


def reader_of(path: str | Path, config: Mapping[str, Any] | None = None) -> Any:
    """The class of the format that opens a path, where transformers cannot.

    None where no format claims it: for a folder of a checkpoint, a hub id, and what is not there.

    Args:
        path: The model.
        config: The content of its config.json, empty without one; None reads it.

    Raises:
        ValueError: It is a packed folder of an earlier version.
    """
    config = _config_of(Path(path)) if config is None else config
    refuse_packed(Path(path), config)
    named = format_of(path)
    entries = [named] if named else [x for x in FORMATS if isinstance(config.get(x.key), dict)]
    kinds = (entry.load_codec() for entry in entries)
    return next((kind for kind in kinds if kind.owns(Path(path))), None)


def refuse_packed(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a folder in the packed format, which versions before 0.4 wrote and ran.

    Raises:
        ValueError: It is one; says how to get a plain checkpoint.
    """
    described = config.get("quantization_config")
    if isinstance(described, dict) and described.get("quant_method") == "prunus":
        raise ValueError(f"{folder} is a packed model: {PACKED}")


def _config_of(folder: Path) -> dict[str, Any]:
    """The content of the config.json of a folder; empty without one."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    return config if isinstance(config, dict) else {}
