"""The folder of a compressed checkpoint after recovery: the same tensors, some with new numbers.

The shards follow the shards of the source. The index comes last, as in `output.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from prunus.model.checkpoint.atomic_files import read_json, write_json, write_text
from prunus.model.checkpoint.companions import copy_companion
from prunus.model.checkpoint.reader import INDEX_NAME, Checkpoint
from prunus.model.checkpoint.writer import save_safetensors
from prunus.packed.description import Description, QuantizedShape
from prunus.packed.source import is_packed
from prunus.recovery.output import files_to_copy

__all__ = ["is_compressed", "write_compressed"]


def is_compressed(folder: Path) -> bool:
    """Whether a folder holds a packed checkpoint with quantised linears.

    Raises:
        ValueError: its description is damaged.
    """
    if not is_packed(folder):
        return False
    content = read_json(folder / "config.json")["quantization_config"]
    shapes = Description.from_dict(content).linears.values()
    return any(isinstance(shape, QuantizedShape) for shape in shapes)


def write_compressed(
    folder: Path, checkpoint: Checkpoint, changed: Mapping[str, torch.Tensor], card: str
) -> dict[str, str]:
    """Write a checkpoint again with some new tensors; all others keep their bytes.

    Args:
        folder: where it goes.
        checkpoint: the compressed checkpoint.
        changed: stored name -> new tensor, which is stored in the dtype of the old one.
        card: content of README.md.

    Returns:
        File name of a shard -> SHA-256 of its bytes.
    """
    digests: dict[str, str] = {}
    files = sorted({info.file for info in checkpoint.tensors.values()})
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        shard = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        keys = [key for key, info in checkpoint.tensors.items() if info.file == file]
        tensors = {
            key: changed[key].to("cpu", tensor.dtype) if key in changed else tensor
            for key, tensor in checkpoint.views(keys)
        }
        # The shard holds views of the source's file, which must not have changed.
        checkpoint.check_unchanged()
        digests[shard] = save_safetensors(folder / shard, tensors)
        weight_map |= dict.fromkeys(keys, shard)
    for path in files_to_copy(checkpoint.folder):
        copy_companion(path, folder / path.name)
    write_text(folder / "README.md", card)
    total = checkpoint.nbytes(checkpoint.tensors)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_NAME, content)
    return digests
