"""The commands `pack` and `unpack`: linears as bitmaps, and an ordinary model again.

They work shard by shard, like pruning: one is read, converted and written before the next is read.

    pack     checks ► `pack_block` for each block, `pack_outside` ► `_pack_linear`
    unpack   checks ► `_unpack_shard` for each file
    both     `_convert` writes the shards, resumes an earlier run, and completes the result
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from prunus.compression.records import (
    ConversionRecord,
    PackOptions,
    PackRecord,
    StoredLinear,
    UnpackRecord,
)
from prunus.distributed import SINGLE_PROCESS
from prunus.engine.folder import ResultFolder, find_earlier, held
from prunus.engine.options import RunOptions
from prunus.engine.progress import Progress, pruning_step, shows_progress
from prunus.engine.record import RunInputs, shard_name
from prunus.engine.session import Session
from prunus.formats.cards import packed_card, unpacked_card
from prunus.hardware.memory import peak_memory
from prunus.hardware.numerics import check_finite
from prunus.model.checkpoint.atomic_files import fingerprint_with, read_json, recorded_digests
from prunus.model.checkpoint.output_folder import check_companions, check_disk
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.checkpoint.regular_files import read_card
from prunus.model.checkpoint.resolve import resolve_folder
from prunus.model.checkpoint.writer import Writable
from prunus.model.device import DTYPES
from prunus.model.embeddings import is_plain
from prunus.model.kinds import require_causal
from prunus.model.linears import Linear, tied_embedding
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.options import Options
from prunus.runtime.bitmap import kept, pack_weight
from prunus.runtime.description import BitmapDtype, Description, PackedShape
from prunus.runtime.forms import checked_weight, expand, relative_error
from prunus.runtime.source import is_packed
from prunus.runtime.weight import PackedWeight, named_tensors

# Records of earlier work that hold for the packed and for the unpacked model as well.
_KEPT_RECORDS = ("prunus.json", "prunus-compress.json")
# What `Description.add_to` adds to config.json.
_ADDED = ("quantization_config", "transformers_weights")

_Record = TypeVar("_Record", bound=ConversionRecord)
# The tensors of a shard, and the records of its linears.
_Shard = tuple[Mapping[str, Writable], dict[str, StoredLinear]]
# File of a shard -> its name for people, and the function that makes it.
_Shards = dict[str, tuple[str, Callable[[], _Shard]]]


@shows_progress("pack", pruning_step)
def pack(
    model: str | Path,
    output: str | Path,
    values: Literal["bf16", "int8"] = "bf16",
    *,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | bool | None = True,
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
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called after every shard with a `prunus.engine.progress.Progress`.

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
    inputs = _find_inputs(checkpoint, source.fingerprint, stored)
    count = source.shard_count
    shards: _Shards = {
        shard_name(index, count): (
            skeleton.block_name(index),
            functools.partial(pack_block, source, skeleton, index, stored),
        )
        for index in range(len(skeleton))
    }
    if source.outside_keys():
        outside = functools.partial(pack_outside, source, skeleton, stored)
        shards[shard_name(count - 1, count)] = ("outside the blocks", outside)

    def describe(record: PackRecord) -> tuple[str, dict[str, Any]]:
        shapes = {
            name: PackedShape(*linear.shape, linear.stored, linear.rare)
            for name, linear in record.linears.items()
            if linear.packed
        }
        if not shapes:
            raise ValueError(
                f"no linear of {model} would get smaller; is it pruned? (prunus inspect shows it)"
            )
        config = Description(stored, shapes).add_to(read_json(checkpoint.folder / "config.json"))
        card = read_card(checkpoint.folder / "README.md")
        return packed_card(card, skeleton.kind.loader), config

    record = PackRecord(source=str(model), recipe=recipe, inputs=inputs)
    needed = checkpoint.nbytes(checkpoint.tensors)
    return _convert(record, output, checkpoint, needed, shards, describe, overwrite, progress)


@shows_progress("unpack", pruning_step)
def unpack(
    model: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | bool | None = True,
) -> UnpackRecord:
    """Write a packed checkpoint as an ordinary one, with the names and shapes from before packing.

    Float values come back bit for bit. int8 values are expanded to the dtype that config.json
    names.

    Args:
        model: folder or hub id of a packed checkpoint.
        output: folder of the result.
        overwrite: replace an earlier result in `output`.
        progress: as for `pack`.

    Returns:
        The record, which is also written to `prunus-unpack.json`.

    Raises:
        ValueError: the checkpoint is not packed, or it is damaged.
        FileNotFoundError, FileExistsError, OSError: before any work.
    """
    here = resolve_folder(model)
    if not is_packed(here):
        raise ValueError(
            f"{model} is not packed, so there is nothing to unpack: it can be used as it is. "
            "unpack takes a checkpoint that prunus pack or prunus compress has written"
        )
    checkpoint = Checkpoint(here)
    config = read_json(here / "config.json")
    described = Description.from_dict(config["quantization_config"])
    described.check_tensors(checkpoint.tensors)
    dtype = described.dtype
    if dtype is None or dtype == torch.int8:
        dtype = _config_dtype(config)
    content = checkpoint.fingerprint + repr(sorted(config.items()))
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    inputs = _find_inputs(checkpoint, fingerprint, str(dtype).removeprefix("torch."))
    needed = checkpoint.nbytes(checkpoint.tensors) + sum(
        shape.out_features * shape.in_features * dtype.itemsize
        for shape in described.linears.values()
    )
    shards: _Shards = {
        file: (file, functools.partial(_unpack_shard, checkpoint, described, names, dtype))
        for file, names in _by_file(checkpoint, described).items()
    }

    def describe(record: UnpackRecord) -> tuple[str, dict[str, Any]]:
        plain = {key: value for key, value in config.items() if key not in _ADDED}
        return unpacked_card(read_card(here / "README.md")), plain

    record = UnpackRecord(source=str(model), recipe=Options(), inputs=inputs)
    return _convert(record, output, checkpoint, needed, shards, describe, overwrite, progress)


def _find_inputs(checkpoint: Checkpoint, fingerprint: str, dtype: str) -> RunInputs:
    """What the result depends on.

    From here on, the checkpoint compares shards that it reads with their recorded SHA-256.
    """
    check_companions(checkpoint.folder)
    recorded = recorded_digests(checkpoint.folder)
    checkpoint.verify_on_read(recorded)
    return RunInputs(
        checkpoint=fingerprint_with(fingerprint, recorded),
        dtype=dtype,
        dtype_reason="as stored",
        device="cpu",
    )


def _convert(
    record: _Record,
    output: str | Path,
    source: Checkpoint,
    needed: int,
    shards: _Shards,
    describe: Callable[[_Record], tuple[str, dict[str, Any]]],
    overwrite: bool,
    progress: Callable[[Progress], None] | bool | None,
) -> _Record:
    """Write the shards that an earlier run has not written, and complete the result.

    Args:
        record: A new record, which is used unless an earlier run is resumed.
        output: Folder of the result.
        source: The checkpoint that is converted.
        needed: The most bytes that the result can take.
        shards: How each shard is made.
        describe: From the record with all linears, the card and the content of config.json.
        overwrite: Whether to replace an earlier result.
        progress: Called after each shard, if it is a function.
    """
    kind, path, started = type(record), Path(output), time.perf_counter()
    session = Session(report=progress if callable(progress) else None)

    def find() -> _Record | None:
        options = RunOptions(overwrite=overwrite)
        earlier = find_earlier(kind, path, record.recipe, options, source.folder)
        if earlier is not None:
            earlier.check_same_run(record.recipe, record.inputs)
        if earlier is None or earlier.state == "running":
            check_disk(path, needed)
        return earlier

    with held(kind, path, SINGLE_PROCESS, find) as earlier:
        current = earlier or record
        folder = ResultFolder(path, current, source)
        if current.state == "finished":
            folder.check_finished()
            return current
        folder.begin(overwrite)
        for done, (file, (name, make)) in enumerate(shards.items(), start=1):
            if not folder.has(file):
                tensors, linears = make()
                folder.write_shard(file, tensors)
                current.shards[file] = linears
                folder.save()
            seconds = time.perf_counter() - started
            message = f"{name} written"
            session.step(Progress(done, len(shards), message, seconds, peak_memory(), "shards"))
        card, config = describe(current)
        folder.finish(current.shards, card=card, config=config, keep_records=_KEPT_RECORDS)
        return current


def pack_block(
    source: CheckpointSource, skeleton: Skeleton, index: int, stored: BitmapDtype
) -> _Shard:
    """The tensors of block `index`, with those linears packed that get smaller."""
    keys, block = source.stored, source.block(index)
    check_finite(block, f"{skeleton.block_name(index)}.")
    tensors, records = source.as_stored(index, block), dict[str, StoredLinear]()
    for linear in skeleton.linears(index):
        # Parts get the checkpoint's own name for the weight, under which transformers looks for it.
        name = f"{skeleton.block_name(index)}.{linear.name}"
        key = keys.get(f"{name}.weight", "")
        name = key.removesuffix(".weight") or name
        packed, records[name] = _pack_linear(block[f"{linear.name}.weight"], stored, linear, key)
        if packed is not None:
            del tensors[key]
            tensors |= named_tensors(name, packed)
    return tensors, records


def pack_outside(source: CheckpointSource, skeleton: Skeleton, stored: BitmapDtype) -> _Shard:
    """The tensors outside the blocks, with the output head or its tied embedding packed."""
    tensors: dict[str, Writable] = {**source.checkpoint.stored(source.outside_keys())}
    try:
        head = tied_embedding(skeleton.model) or skeleton.head()
    except NotImplementedError:  # the model has no output head
        return tensors, {}
    key = f"{head.name}.weight"
    if key not in tensors or len(tensors[key].shape) != 2:
        return tensors, {}
    weight = source.checkpoint.whole(key)
    check_finite({key: weight})
    packed, record = _pack_linear(weight, stored, head, key)
    if packed is None:
        return tensors, {}
    del tensors[key]
    return tensors | named_tensors(head.name, packed), {head.name: record}


def _pack_linear(
    weight: torch.Tensor, stored: BitmapDtype, linear: Linear, key: str
) -> tuple[PackedWeight | None, StoredLinear]:
    """A linear as a bitmap, or None where it stays as it is, and its record.

    Args:
        weight: The weight as the checkpoint stores it.
        stored: The dtype of the packed values.
        linear: The module of the skeleton.
        key: The name under which the checkpoint stores the weight; "" if it has none of its own.
    """
    before = weight.numel() * weight.element_size()
    count = int(torch.count_nonzero(kept(weight)))  # a sum would convert each bool to 8 bytes
    record = StoredLinear(shape=linear.shape, kept=count, packed=False, nbytes=(before, before))
    if linear.transposed:
        record.reason = f"{type(linear.module).__name__} stores its weight transposed"
    elif not is_plain(linear.module):
        record.reason = f"{type(linear.module).__name__} may compute something other than nn.Linear"
    elif not key:
        record.reason = "the checkpoint stores it in one tensor with other experts'"
    elif not key.endswith(".weight"):
        record.reason = f"the checkpoint calls it {key!r}"
    elif stored != "int8" and str(weight.dtype) != f"torch.{stored}":
        record.reason = f"it is stored in {str(weight.dtype).removeprefix('torch.')}"
    if record.reason is not None:
        return None, record
    packed = pack_weight(weight, torch.int8 if stored == "int8" else weight.dtype)
    if packed.nbytes >= before:
        record.reason = "it would not get smaller"
        return None, record
    record.packed, record.nbytes = True, (before, packed.nbytes)
    record.stored = count if packed.mask is not None else weight.numel()
    record.rare = None if packed.coding is None else packed.coding.rare.shape[0]
    record.relative_error = relative_error(weight, packed) if stored == "int8" else None
    return packed, record


def _by_file(checkpoint: Checkpoint, described: Description) -> dict[str, list[str]]:
    """Shard -> its tensors. All parts of a linear are in the shard of its values."""
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
) -> _Shard:
    """The tensors `names` of a shard, with packed linears as dense weights of `dtype`."""
    tensors = dict(checkpoint.read(names))
    records = {}
    for linear in [name.removesuffix(".weight") for name in names]:
        if linear not in described.linears:
            continue
        parts = {name: tensors.pop(name) for name in described.tensors(linear)}
        packed, offsets = checked_weight(described, linear, parts)
        tensors[f"{linear}.weight"] = weight = expand(packed, dtype, offsets)
        nbytes = (packed.nbytes, weight.numel() * weight.element_size())
        records[linear] = StoredLinear(
            shape=packed.shape, kept=int(kept(weight).sum()), packed=False, nbytes=nbytes
        )
    check_finite(tensors)
    return tensors, records


def _config_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype that config.json gives the model; bfloat16 where it gives none."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(
            f"config.json gives the model the dtype {name!r}; expected bfloat16, float16 or float32"
        )
    return DTYPES[name]
