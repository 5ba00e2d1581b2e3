"""How large a model is: bytes of its files, and bits per weight of the linears in its blocks.

Models are compared at equal size. Bits per weight leave out the embedding and the head, which no
method prunes as a rule and which are a third of a small model. Masks, scales and codes count.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from prunus.evaluation.inspection import open_by_blocks
from prunus.evaluation.records import ModelSize
from prunus.model.adapter import base_folder, is_adapter
from prunus.model.linears import Linear, tied_embedding
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.packed.bitmap import packed_bytes
from prunus.packed.source import PackedSource

#: Dtypes that `prunus pack` stores without loss.
_LOSSLESS = (torch.bfloat16, torch.float16)


def file_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's safetensors, plus those of its base if it is an adapter."""
    below = file_bytes(base_folder(folder)) if is_adapter(folder) else 0
    return below + sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def stored_size(folder: Path, trust_remote_code: bool = False) -> ModelSize:
    """The size of a checkpoint or an adapter as it is stored. Reads headers only."""
    try:
        bits = _stored_bits(folder, trust_remote_code)
    except (ValueError, FileNotFoundError, NotImplementedError):
        # A model can be scored without prunus knowing its blocks.
        bits = None
    return ModelSize(file_bytes(folder), bits)


def _stored_bits(folder: Path, trust_remote_code: bool) -> float | None:
    """Bits per weight; None where a linear is stored under no known name, and for an adapter."""
    if is_adapter(folder):
        return None
    source, skeleton = open_by_blocks(folder, trust_remote_code)
    keys = source.stored if isinstance(source, CheckpointSource) else {}
    nbytes = weights = 0
    for index in range(len(skeleton)):
        for linear in skeleton.linears(index):
            name, count = f"{skeleton.block_name(index)}.{linear.name}", math.prod(linear.shape)
            if isinstance(source, CheckpointSource):
                info = source.checkpoint.tensors.get(keys.get(f"{name}.weight", ""))
                # Fused experts lie in one tensor together, which has no name of its own for each.
                size = info.nbytes if info else count * source.stored_dtype.itemsize
            elif (stored := source.nbytes(name)) is not None:
                size = stored
            else:
                return None
            nbytes += size
            weights += count
    return 8 * nbytes / weights


def packed_size(folder: Path, trust_remote_code: bool = False) -> ModelSize | None:
    """The size that `prunus pack` would give a model without loss. Writes nothing.

    One block is in memory at a time.

    Returns:
        The size; None for what is packed already, for adapters, for dtypes that a bitmap does not
        hold, and for models that prunus cannot take apart.
    """
    if is_adapter(folder):
        return None
    try:
        source, skeleton = open_by_blocks(folder, trust_remote_code)
    except (ValueError, FileNotFoundError, NotImplementedError):
        return None
    if isinstance(source, PackedSource) or source.stored_dtype not in _LOSSLESS:
        return None
    keys = source.stored
    before = after = weights = 0
    for index in range(len(skeleton)):
        stored = source.block(index)
        for linear in skeleton.linears(index):
            weight = stored[f"{linear.name}.weight"]
            key = keys.get(f"{skeleton.block_name(index)}.{linear.name}.weight", "")
            before += weight.nbytes
            after += _packed_bytes(weight, linear, key)
            weights += weight.numel()
    saved = before - after + _saved_outside(source, skeleton)
    return ModelSize(file_bytes(folder) - saved, 8 * after / weights)


def _packed_bytes(weight: torch.Tensor, linear: Linear, key: str) -> int:
    """Bytes of a weight after `prunus pack`, which leaves some kinds of linears as they are."""
    plain = linear.transposed or type(linear.module) not in (nn.Linear, nn.Embedding)
    if plain or not key.endswith(".weight") or weight.dtype not in _LOSSLESS:
        return weight.nbytes
    return min(weight.nbytes, packed_bytes(weight))


def _saved_outside(source: CheckpointSource, skeleton: Skeleton) -> int:
    """Bytes that packing the output head saves, or the embedding that it is tied to."""
    try:
        head = tied_embedding(skeleton.model) or skeleton.head()
    except NotImplementedError:
        return 0
    key = f"{head.name}.weight"
    if key not in source.checkpoint.tensors:
        return 0
    weight = dict(source.checkpoint.views([key]))[key]
    return weight.nbytes - _packed_bytes(weight, head, key)
