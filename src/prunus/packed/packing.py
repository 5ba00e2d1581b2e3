"""Pack a pruned checkpoint into bitmaps, and unpack any packed checkpoint again.

It works block by block, like pruning: a shard is read, converted and written before the next one is
read.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from prunus.model.checkpoint.atomic_files import read_json
from prunus.model.checkpoint.card import add_tags, with_fields
from prunus.model.checkpoint.reader import Checkpoint, resolve_folder
from prunus.model.kinds import require_causal
from prunus.model.linears import Linear, tied_embedding
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.packed.bitmap import kept, pack_weight
from prunus.packed.conversion import Conversion, LinearRecord, Record, open_conversion
from prunus.packed.description import Description, PackedShape, Stored
from prunus.packed.forms import checked_weight, expand, relative_error
from prunus.packed.weight import PackedWeight, named_tensors

__all__ = ["add_packed_card", "pack", "unpack"]

Progress = Callable[[int, int, str], None]
_CARD = """
## Packed by prunus

The linears are stored in the packed format (`docs/reference/packed-format.md` of prunus). Install
prunus, then:

```python
import prunus
from transformers import LOADER

model = LOADER.from_pretrained("this folder")
```

`prunus unpack` turns it into an ordinary checkpoint again.
"""


def add_packed_card(readme: str | None, loader: str = "AutoModelForCausalLM") -> str:
    """Return a model card that ends with how to load a packed checkpoint.

    Its library is prunus, because transformers alone cannot load it.

    Args:
        readme: the card of the source, or None.
        loader: the class of transformers that loads it.
    """
    text = (readme or "# A packed model\n") + _CARD.replace("LOADER", loader)
    return with_fields(add_tags(text, ["prunus", "packed"]), {"library_name": "prunus"})


def _unpacked_card(readme: str | None) -> str:
    section = re.escape(_CARD).replace("LOADER", r"\w+")
    card = re.sub(section, "", readme or "# An unpacked model\n")
    return with_fields(add_tags(card, [], ["packed"]), {"library_name": "transformers"})


def pack(
    model: str | Path,
    output: str | Path,
    values: Literal["bf16", "int8"] = "bf16",
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Write a pruned checkpoint with its linears as bitmaps.

    Linears are packed where that makes them smaller, and so is the output head, or the embedding
    that it is tied to. Everything else outside the blocks stays as it is, and so does GPT-2's
    transposed Conv1D.

    Args:
        model: checkpoint folder or hub id.
        output: folder of the result.
        values: "bf16" keeps the surviving weights bit for bit in their dtype, bfloat16 (coded in
            twelve bits where exponents allow it) or float16; "int8" rounds them to 8 bits with one
            scale per row.
        overwrite: replace an earlier result in `output`.
        progress: called after every shard with (done, total, name of the shard's content).

    Returns:
        The record, which is also written to `prunus-pack.json`: per linear its shape, survivors,
        bytes and error.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: before any
        work.
    """
    if values not in ("bf16", "int8"):
        raise ValueError(f"values must be bf16 or int8, got {values!r}")
    source = CheckpointSource(resolve_folder(model))
    require_causal(source.config, "prunus pack")
    if values == "bf16" and source.stored_dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{model} is stored in {str(source.stored_dtype).removeprefix('torch.')}, which "
            "bitmaps do not hold: convert it to bfloat16 first (from_pretrained with "
            "dtype=torch.bfloat16, then save_pretrained), or pack int8"
        )
    stored: Stored = (
        "int8"
        if values == "int8"
        else "bfloat16"
        if source.stored_dtype == torch.bfloat16
        else "float16"
    )
    skeleton = Skeleton(source.config, source.stored_dtype)
    source.bind(skeleton)
    record = Record(action="pack", source=str(model), fingerprint=source.fingerprint, values=stored)
    needed = source.checkpoint.nbytes(source.checkpoint.tensors)
    with open_conversion(source.checkpoint, Path(output), record, overwrite, needed) as conversion:
        if not conversion.record.finished:
            _pack_all(conversion, source, skeleton, stored, progress)
        return conversion.record


def _pack_all(
    conversion: Conversion,
    source: CheckpointSource,
    skeleton: Skeleton,
    stored: Stored,
    progress: Progress | None,
) -> None:
    conversion.begin()
    shards = len(skeleton) + 1
    for index in range(len(skeleton)):
        shard = f"block-{index:05d}.safetensors"
        if shard not in conversion.record.shards:
            conversion.commit(shard, *_pack_block(source, skeleton, index, stored))
        if progress is not None:
            progress(index + 1, shards, skeleton.block_name(index))
    outer = source.outside_keys()
    if outer:
        conversion.commit("outer.safetensors", *_pack_outside(source, skeleton, outer, stored))
    if progress is not None:
        progress(shards, shards, "outside the blocks")
    _finish_packed(conversion, stored, skeleton.kind.loader)


def _pack_block(
    source: CheckpointSource, skeleton: Skeleton, index: int, stored: Stored
) -> tuple[dict[str, torch.Tensor], dict[str, LinearRecord]]:
    """Return the tensors of a block's shard, and the records of its linears."""
    linears = {linear.name: linear for linear in skeleton.linears(index)}
    keys = source.stored_names()
    records: dict[str, LinearRecord] = {}
    block = source.block(index)
    tensors = source.as_stored(index, block)
    for relative, weight in block.items():
        owner = relative.removesuffix(".weight")
        linear = linears.get(owner) if relative.endswith(".weight") else None
        if linear is None:
            continue
        # Parts get the checkpoint's own name for the weight, under which transformers looks for it.
        name = f"{skeleton.block_name(index)}.{owner}"
        key = keys.get(f"{name}.weight", "")
        name = key.removesuffix(".weight") or name
        packed, records[name] = _pack_linear(weight, stored, linear, key)
        if packed is not None:
            del tensors[key]
            tensors |= named_tensors(name, packed)
    return tensors, records


def _pack_outside(
    source: CheckpointSource, skeleton: Skeleton, keys: Sequence[str], stored: Stored
) -> tuple[dict[str, torch.Tensor], dict[str, LinearRecord]]:
    """Return the tensors outside the blocks, with the output head or its tied embedding packed."""
    tensors = dict(source.checkpoint.views(keys))
    try:
        head = tied_embedding(skeleton.model) or skeleton.head()
    except NotImplementedError:  # the model has no output head
        return tensors, {}
    weight = tensors.get(f"{head.name}.weight")
    if weight is None or weight.dim() != 2:
        return tensors, {}
    packed, record = _pack_linear(weight, stored, head, f"{head.name}.weight")
    if packed is None:
        return tensors, {}
    del tensors[f"{head.name}.weight"]
    return tensors | named_tensors(head.name, packed), {head.name: record}


def _pack_linear(
    weight: torch.Tensor, stored: Stored, linear: Linear, key: str
) -> tuple[PackedWeight | None, LinearRecord]:
    rows, columns = linear.shape
    kind = type(linear.module)
    before = weight.numel() * weight.element_size()
    count = int(torch.count_nonzero(kept(weight)))  # a sum would convert each bool to 8 bytes
    reason = packed = None
    if linear.transposed:
        reason = f"{kind.__name__} stores its weight transposed"
    elif kind not in (nn.Linear, nn.Embedding):
        reason = f"{kind.__name__} may compute something other than nn.Linear"
    elif not key:
        reason = "the checkpoint stores it in one tensor with other experts'"
    elif not key.endswith(".weight"):
        reason = f"the checkpoint calls it {key!r}"
    elif stored != "int8" and str(weight.dtype) != f"torch.{stored}":
        reason = f"it is stored in {str(weight.dtype).removeprefix('torch.')}"
    else:
        packed = pack_weight(weight, torch.int8 if stored == "int8" else weight.dtype)
        if packed.nbytes >= before:
            reason = "it would not get smaller"
    if packed is None or reason is not None:
        return None, LinearRecord(
            shape=(rows, columns), kept=count, packed=False, reason=reason, nbytes=(before, before)
        )
    return packed, LinearRecord(
        shape=(rows, columns),
        kept=count,
        stored=count if packed.mask is not None else rows * columns,
        rare=None if packed.coding is None else packed.coding.rare.shape[0],
        packed=True,
        nbytes=(before, packed.nbytes),
        relative_error=relative_error(weight, packed) if stored == "int8" else None,
    )


def _finish_packed(conversion: Conversion, stored: Stored, loader: str) -> None:
    packed = {name: record for name, record in conversion.record.linears.items() if record.packed}
    if not packed:
        raise ValueError(
            f"no linear of {conversion.record.source} would get smaller; is it pruned? "
            "(prunus inspect shows it)"
        )
    shapes = {name: PackedShape(*r.shape, r.stored, r.rare) for name, r in packed.items()}
    config = read_json(conversion.source.folder / "config.json")
    config = Description(stored, shapes).add_to(config)
    conversion.finish(config, functools.partial(add_packed_card, loader=loader))


def unpack(
    model: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Write a packed checkpoint as an ordinary one, with the names and shapes from before packing.

    Float values come back bit for bit. int8 values are expanded to the dtype that config.json
    names.

    Args:
        model: folder or hub id of a packed checkpoint.
        output: folder of the result.
        overwrite: replace an earlier result in `output`.
        progress: called after every shard with (done, total, shard).

    Returns:
        The record, which is also written to `prunus-unpack.json`.

    Raises:
        ValueError: the checkpoint is not packed, or it is damaged.
        FileNotFoundError, FileExistsError, OSError: before any work.
    """
    folder = resolve_folder(model)
    checkpoint = Checkpoint(folder)
    config = read_json(folder / "config.json")
    described = Description.from_dict(
        config.get("quantization_config") if isinstance(config, dict) else None
    )
    described.check_tensors(checkpoint.tensors)
    dtype = described.dtype
    if dtype is None or dtype == torch.int8:
        dtype = _config_dtype(config)
    fingerprint = hashlib.sha256(
        (checkpoint.fingerprint + repr(sorted(config.items()))).encode()
    ).hexdigest()
    record = Record(
        action="unpack",
        source=str(model),
        fingerprint=fingerprint,
        values=str(dtype).removeprefix("torch."),
    )
    shapes = described.linears.values()
    needed = checkpoint.nbytes(checkpoint.tensors) + sum(
        shape.out_features * shape.in_features * dtype.itemsize for shape in shapes
    )
    with open_conversion(checkpoint, Path(output), record, overwrite, needed) as conversion:
        if not conversion.record.finished:
            _unpack_all(conversion, checkpoint, described, config, dtype, progress)
        return conversion.record


def _unpack_all(
    conversion: Conversion,
    checkpoint: Checkpoint,
    described: Description,
    config: dict[str, Any],
    dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    conversion.begin()
    files = _by_file(checkpoint, described)
    for done, (file, names) in enumerate(files.items(), start=1):
        if file not in conversion.record.shards:
            conversion.commit(file, *_unpack_shard(checkpoint, described, names, dtype))
        if progress is not None:
            progress(done, len(files), file)
    plain = {
        k: v for k, v in config.items() if k not in ("quantization_config", "transformers_weights")
    }
    conversion.finish(plain, _unpacked_card)


def _by_file(checkpoint: Checkpoint, described: Description) -> dict[str, list[str]]:
    """Map every shard to its tensors.

    All parts of a linear go with its values, whatever their shard.
    """
    home = {
        part: f"{linear}.weight"
        for linear in described.linears
        for part in described.tensors(linear)
    }
    files: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        files.setdefault(checkpoint.tensors[home.get(name, name)].file, []).append(name)
    return dict(sorted(files.items()))


def _unpack_shard(
    checkpoint: Checkpoint, described: Description, names: list[str], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, LinearRecord]]:
    tensors = dict(checkpoint.read(names))
    records = {}
    for linear in [name.removesuffix(".weight") for name in names]:
        if linear not in described.linears:
            continue
        parts = {name: tensors.pop(name) for name in described.tensors(linear)}
        packed, offsets = checked_weight(described, linear, parts)
        tensors[f"{linear}.weight"] = weight = expand(packed, dtype, offsets)
        nbytes = (packed.nbytes, weight.numel() * weight.element_size())
        records[linear] = LinearRecord(
            shape=packed.shape, kept=int(kept(weight).sum()), packed=False, nbytes=nbytes
        )
    return tensors, records


def _config_dtype(config: dict[str, Any]) -> torch.dtype:
    """Return the dtype that config.json gives the model; bfloat16 where it gives none."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"config.json gives the model the dtype {name!r}; expected bfloat16, float16 or float32"
        )
    return dtype
