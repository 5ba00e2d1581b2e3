"""The table of the formats of compressed models. Imports no torch.

It lies below the formats and names them as text, so whoever opens a model can ask it. The class of
a format is imported when a run needs it, or when a path has the format's suffix.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from prunus.model.checkpoint.atomic_files import read_json


class FormatEntry(NamedTuple):
    """Where a format is found.

    Attributes:
        name: What `--format` takes.
        home: The module and the class, as "module:class". The class derives from
            `formats.base.CompressedFormat`.
        suffix: The end of the name of an output that implies the format, in small letters. A model
            with such a name is opened by the class. Empty for a folder.
        key: The key of config.json that a folder of the format has, and which is opened by the
            class. Empty for a folder that transformers reads.
    """

    name: str
    home: str
    suffix: str = ""
    key: str = ""

    def load(self) -> Any:
        """The class of the format."""
        module, _, kind = self.home.partition(":")
        return getattr(import_module(module), kind)


#: All formats, in the order of the help.
FORMATS = (
    FormatEntry("packed", "prunus.formats.packed.format:PackedFormat"),
    FormatEntry("compressed-tensors", "prunus.formats.compressed_tensors:TensorsFormat"),
    FormatEntry("mlx", "prunus.formats.mlx:MlxFormat", key="quantization"),
    FormatEntry("gguf", "prunus.formats.gguf.format:GgufFormat", ".gguf"),
)
#: The suffixes of all formats that have one.
SUFFIXES = [entry.suffix for entry in FORMATS if entry.suffix]


def folder_formats() -> list[str]:
    """The names of the formats whose result is a folder. The others follow from the output.

    >>> folder_formats()
    ['packed', 'compressed-tensors', 'mlx']
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


def reader_of(path: str | Path) -> Any:
    """The class of the format that opens a path, where transformers cannot.

    None where no format claims it: for a folder of a checkpoint, a hub id, and what is not there.
    """
    entry = format_of(path) or _format_in(Path(path))
    kind = None if entry is None else entry.load()
    return kind if kind is not None and kind.owns(Path(path)) else None


def _format_in(folder: Path) -> FormatEntry | None:
    """The format that the config.json of a folder names; None for none."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    keys = config if isinstance(config, dict) else {}
    return next((entry for entry in FORMATS if isinstance(keys.get(entry.key), dict)), None)
