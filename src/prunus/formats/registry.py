"""The table of the formats of compressed models. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple


class FormatEntry(NamedTuple):
    """Where a format is found.

    Attributes:
        name: What `--format` takes.
        home: The module and the class, as "module:class". The class derives from
            `base.CompressedFormat` and is imported when a run needs it.
        suffix: The end of the name of an output that implies the format; empty for a folder.
    """

    name: str
    home: str
    suffix: str = ""


#: All formats, in the order of the help.
FORMATS = (
    FormatEntry("packed", "prunus.formats.packed.format:PackedFormat"),
    FormatEntry("compressed-tensors", "prunus.formats.compressed_tensors:TensorsFormat"),
    FormatEntry("gguf", "prunus.formats.gguf.format:GgufFormat", ".gguf"),
)


def folder_formats() -> list[str]:
    """The names of the formats whose result is a folder. The others follow from the output.

    >>> folder_formats()
    ['packed', 'compressed-tensors']
    """
    return [entry.name for entry in FORMATS if not entry.suffix]
