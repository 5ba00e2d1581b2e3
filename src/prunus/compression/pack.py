"""The verb `pack`: store the linears of a pruned checkpoint as bitmaps.

It works block by block, like pruning: a shard is read, converted and written before the next one is
read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from prunus.compression.card import packed_card
from prunus.compression.pack_record import (
    KEPT_RECORDS,
    PackOptions,
    PackRecord,
    StoredLinear,
    find_inputs,
    opened,
    write_shard,
)
from prunus.model.checkpoint.atomic_files import read_json
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.checkpoint.regular_files import read_card
from prunus.model.kinds import require_causal
from prunus.model.linears import Linear, tied_embedding
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.packed.bitmap import kept, pack_weight
from prunus.packed.description import Description, PackedShape, Stored
from prunus.packed.forms import relative_error
from prunus.packed.weight import PackedWeight, named_tensors
from prunus.runs.record import OUTSIDE_SHARD, shard_name


def pack(
    model: str | Path,
    output: str | Path,
    values: Literal["bf16", "int8"] = "bf16",
    *,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> PackRecord:
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
    recipe = PackOptions.read(None, {"values": values})
    source = CheckpointSource(resolve_folder(model))
    require_causal(source.config, "prunus pack")
    dtype = str(source.stored_dtype).removeprefix("torch.")
    if values == "bf16" and dtype not in ("bfloat16", "float16"):
        raise ValueError(
            f"{model} is stored in {dtype}, which bitmaps do not hold: convert it to bfloat16 "
            "first (from_pretrained with dtype=torch.bfloat16, then save_pretrained), or pack int8"
        )
    stored: Any = "int8" if values == "int8" else dtype
    skeleton = Skeleton(source.config, source.stored_dtype)
    source.bind(skeleton)
    checkpoint = source.checkpoint
    record = PackRecord(
        source=str(model),
        recipe=recipe,
        inputs=find_inputs(checkpoint, source.fingerprint, stored, "the dtype of stored values"),
    )
    needed = checkpoint.nbytes(checkpoint.tensors)
    with opened(record, Path(output), checkpoint, overwrite, needed) as (folder, record):
        if record.state == "finished":
            return record
        shards = len(skeleton) + 1
        for index in range(len(skeleton)):
            if not folder.has(shard_name(index)):
                packed = _pack_block(source, skeleton, index, stored)
                write_shard(folder, record, shard_name(index), *packed)
            if progress is not None:
                progress(index + 1, shards, skeleton.block_name(index))
        outer = source.outside_keys()
        if outer and not folder.has(OUTSIDE_SHARD):
            packed = _pack_outside(source, skeleton, outer, stored)
            write_shard(folder, record, OUTSIDE_SHARD, *packed)
        if progress is not None:
            progress(shards, shards, "outside the blocks")
        linears = {name: each for name, each in record.linears.items() if each.packed}
        if not linears:
            raise ValueError(
                f"no linear of {model} would get smaller; is it pruned? (prunus inspect shows it)"
            )
        shapes = {
            n: PackedShape(*each.shape, each.stored, each.rare) for n, each in linears.items()
        }
        config = Description(stored, shapes).add_to(read_json(checkpoint.folder / "config.json"))
        card = packed_card(read_card(checkpoint.folder / "README.md"), skeleton.kind.loader)
        folder.finish(record.shards, card=card, config=config, keep_records=KEPT_RECORDS)
        return record


def _pack_block(
    source: CheckpointSource, skeleton: Skeleton, index: int, stored: Stored
) -> tuple[dict[str, torch.Tensor], dict[str, StoredLinear]]:
    """Return the tensors of a block's shard, and the records of its linears."""
    linears = {linear.name: linear for linear in skeleton.linears(index)}
    keys = source.stored
    records: dict[str, StoredLinear] = {}
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
) -> tuple[dict[str, torch.Tensor], dict[str, StoredLinear]]:
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
) -> tuple[PackedWeight | None, StoredLinear]:
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
        return None, StoredLinear(
            shape=(rows, columns), kept=count, packed=False, reason=reason, nbytes=(before, before)
        )
    return packed, StoredLinear(
        shape=(rows, columns),
        kept=count,
        stored=count if packed.mask is not None else rows * columns,
        rare=None if packed.coding is None else packed.coding.rare.shape[0],
        packed=True,
        nbytes=(before, packed.nbytes),
        relative_error=relative_error(weight, packed) if stored == "int8" else None,
    )
