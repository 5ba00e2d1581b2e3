"""The verb `unpack`: turn a packed checkpoint, of bitmaps or quantised, into an ordinary one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prunus.compression.card import unpacked_card
from prunus.compression.pack_record import (
    KEPT_RECORDS,
    StoredLinear,
    UnpackRecord,
    find_inputs,
    opened,
    write_shard,
)
from prunus.model.checkpoint.atomic_files import read_json
from prunus.model.checkpoint.reader import Checkpoint, resolve_folder
from prunus.model.checkpoint.regular_files import read_card
from prunus.options import Options
from prunus.packed.bitmap import kept
from prunus.packed.description import Description
from prunus.packed.forms import checked_weight, expand


def unpack(
    model: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> UnpackRecord:
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
    here = resolve_folder(model)
    checkpoint = Checkpoint(here)
    config = read_json(here / "config.json")
    described = Description.from_dict(
        config.get("quantization_config") if isinstance(config, dict) else None
    )
    described.check_tensors(checkpoint.tensors)
    dtype = described.dtype
    if dtype is None or dtype == torch.int8:
        dtype = _config_dtype(config)
    content = checkpoint.fingerprint + repr(sorted(config.items()))
    fingerprint, expanded = hashlib.sha256(content.encode()), str(dtype).removeprefix("torch.")
    record = UnpackRecord(
        source=str(model),
        recipe=Options(),
        inputs=find_inputs(
            checkpoint, fingerprint.hexdigest(), expanded, "that of the dense model"
        ),
    )
    shapes = described.linears.values()
    needed = checkpoint.nbytes(checkpoint.tensors) + sum(
        shape.out_features * shape.in_features * dtype.itemsize for shape in shapes
    )
    with opened(record, Path(output), checkpoint, overwrite, needed) as (folder, record):
        if record.state == "finished":
            return record
        files = _by_file(checkpoint, described)
        for done, (file, names) in enumerate(files.items(), start=1):
            if not folder.has(file):
                write_shard(
                    folder, record, file, *_unpack_shard(checkpoint, described, names, dtype)
                )
            if progress is not None:
                progress(done, len(files), file)
        added = ("quantization_config", "transformers_weights")
        plain = {key: value for key, value in config.items() if key not in added}
        card = unpacked_card(read_card(here / "README.md"))
        folder.finish(record.shards, card=card, config=plain, keep_records=KEPT_RECORDS)
        return record


def _by_file(checkpoint: Checkpoint, described: Description) -> dict[str, list[str]]:
    """Map every shard to its tensors; all parts of a linear are in the shard of its values."""
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
) -> tuple[dict[str, torch.Tensor], dict[str, StoredLinear]]:
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
