"""The table of the formats of compressed models. Imports no torch.

A new format is one entry here. The class of a format is imported when a run needs it.
"""

from __future__ import annotations

from typing import Any

from prunus.model.formats import FORMATS, FormatEntry


def _compressed_tensors() -> Any:
    from prunus.formats.compressed_tensors import TensorsCodec

    return TensorsCodec


def _mlx() -> Any:
    from prunus.formats.mlx import MlxCodec

    return MlxCodec


def _gguf() -> Any:
    from prunus.formats.gguf.codec import GgufCodec

    return GgufCodec


FORMATS[:] = [
    FormatEntry("compressed-tensors", _compressed_tensors),
    FormatEntry("mlx", _mlx, key="quantization"),
    FormatEntry("gguf", _gguf, ".gguf"),
]
