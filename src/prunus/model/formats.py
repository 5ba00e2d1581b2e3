"""The table of the formats of compressed models. Imports no torch.

It lies below the formats and names them as text, so whoever opens a model can ask it. The class of
a format is imported when a run needs it, or when a path has the format's suffix.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from prunus.model.checkpoint.files import read_json


class FormatEntry(NamedTuple):
    """Where a format is found.

    Attributes:
        name: What `--format` takes.
        home: The module and the class, as "module:class". The class derives from
            `formats.codec.Codec`.
        suffix: The end of the name of an output that implies the format, in small letters. A model
            with such a name is opened by the class. Empty for a folder.
        key: The key of config.json that a folder of the format has. Such a folder is opened by the
            class, if it `owns` the folder. Empty for a file, and for a folder that is read as a
            checkpoint; see `checkpoint/quantized.py`.
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
    FormatEntry("compressed-tensors", "prunus.formats.compressed_tensors:TensorsCodec"),
    FormatEntry("mlx", "prunus.formats.mlx:MlxCodec", key="quantization"),
    FormatEntry("gguf", "prunus.formats.gguf.codec:GgufCodec", ".gguf"),
)
#: What to do with a packed model: the end of a sentence.
PACKED = (
    "prunus before 0.4 made it, and this version does not read it. `prunus unpack` of version 0.3 "
    "turns it back into a plain checkpoint"
)
#: The suffixes of all formats that have one.
SUFFIXES = [entry.suffix for entry in FORMATS if entry.suffix]


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


def reader_of(path: str | Path) -> Any:
    """The class of the format that opens a path, where transformers cannot.

    None where no format claims it: for a folder of a checkpoint, a hub id, and what is not there.

    Raises:
        ValueError: It is a packed folder of an earlier version.
    """
    named, config = format_of(path), _config_of(Path(path))
    refuse_packed(Path(path))
    entries = [named] if named else [x for x in FORMATS if isinstance(config.get(x.key), dict)]
    kinds = (entry.load() for entry in entries)
    return next((kind for kind in kinds if kind.owns(Path(path))), None)


def refuse_packed(folder: Path) -> None:
    """Refuse a folder in the packed format, which versions before 0.4 wrote and ran.

    Raises:
        ValueError: It is one; says how to get a plain checkpoint.
    """
    described = _config_of(folder).get("quantization_config")
    if isinstance(described, dict) and described.get("quant_method") == "prunus":
        raise ValueError(f"{folder} is a packed model: {PACKED}")


def _config_of(folder: Path) -> dict[str, Any]:
    """The content of the config.json of a folder; empty without one."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    return config if isinstance(config, dict) else {}
