"""The result of a recovery: the tensors of the pruned checkpoint, some of them replaced.

Every pruned linear is checked, weight by weight, before its shard is written. Tensors are stored in
the dtype of the pruned checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from prunus.compression.record import CompressionRecord
from prunus.model.adapter import save_adapter
from prunus.model.checkpoint.atomic_files import write_text
from prunus.model.names import stored_names
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.pruning.manifest import Manifest
from prunus.recovery.job import RecoveryJob
from prunus.recovery.options import Mode
from prunus.recovery.record import LinearMask, RecoveryRecord
from prunus.recovery.scales import trained_tensors
from prunus.recovery.student import base_name
from prunus.recovery.trainable import Trainable, check_zeros
from prunus.runs.folder import ResultFolder
from prunus.runs.record import (
    OUTSIDE_SHARD,
    bos_words,
    extended_card,
    result_card,
    shard_name,
    source_name,
)
from prunus.structure.record import StructureRecord

# Records of what was done to the source before. They hold for the result as well.
_KEPT_RECORDS = (Manifest.FILE, CompressionRecord.FILE, StructureRecord.FILE)


def write_result(job: RecoveryJob, folder: ResultFolder, trainable: Trainable) -> None:
    """Write the adapter, or the checkpoint with its zeros checked, and complete the record.

    Raises:
        RuntimeError: A pruned weight is not zero; no index is written.
    """
    record = job.record
    if job.recipe.mode == "lora":
        record.sha256 |= save_adapter(trainable.model, folder.folder)
        card = adapter_card(record, base_name(job.model), job.source.checkpoint.folder)
        write_text(folder.folder / "README.md", card)
        record.state = "finished"
        folder.save()
        return
    if job.skeleton is not None:
        # A tied head and embedding are one parameter with two names; both may be stored.
        changed = dict(trainable.model.named_parameters(remove_duplicate=False))
        shards = _shards_of_blocks(job.source, job.skeleton)
    else:
        trained = trained_tensors(trainable)
        names = stored_names(trainable.model, job.source.checkpoint.tensors, trained)
        changed = {key: trained[name] for key, name in names.items()}
        shards = _shards_as_stored(job.source)
    for shard in shards:
        written = {
            name: changed[name].detach().to("cpu", tensor.dtype) if name in changed else tensor
            for name, tensor in shard.tensors.items()
        }
        for name, linear in trainable.pruned.items():
            key = f"{name}.weight"
            if key in written:
                record.linears[name] = check_zeros(
                    name, linear.shape, shard.tensors[key], written[key]
                )
        folder.write_shard(shard.file, shard.stored(written))
    if job.skeleton is not None:
        record.totals |= _zero_totals(record)
    card = checkpoint_card(record, job.card)
    folder.finish(record.sha256, card=card, keep_records=_KEPT_RECORDS)


class _Shard(NamedTuple):
    """A shard of the result.

    Attributes:
        file: Its name.
        tensors: Those of the source. Names are the model's, or the stored one where the model
            has none.
        stored: Turns tensors by these names into tensors by stored names.
    """

    file: str
    tensors: Mapping[str, Tensor]
    stored: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def _shards_of_blocks(source: CheckpointSource, skeleton: Skeleton) -> Iterator[_Shard]:
    """One shard per block, with experts one by one, and one for everything outside the blocks."""
    for index in range(len(skeleton)):
        prefix = f"{skeleton.block_name(index)}."
        tensors = {f"{prefix}{name}": x for name, x in source.block(index).items()}
        yield _Shard(
            shard_name(index), tensors, functools.partial(_block_as_stored, source, index, prefix)
        )
    names = {key: name for name, key in source.stored_names().items()}
    outside = dict(source.checkpoint.read(source.outside_keys()))
    if outside:
        keys = {names.get(key, key): key for key in outside}
        yield _Shard(
            OUTSIDE_SHARD,
            {name: outside[key] for name, key in keys.items()},
            lambda tensors: {keys[name]: x for name, x in tensors.items()},
        )


def _block_as_stored(
    source: CheckpointSource, index: int, prefix: str, tensors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    relative = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return source.as_stored(index, relative)


def _shards_as_stored(source: CheckpointSource) -> Iterator[_Shard]:
    """The shards of a compressed checkpoint, tensor by tensor as it stores them."""
    checkpoint = source.checkpoint
    files = sorted({info.file for info in checkpoint.tensors.values()})
    for number, file in enumerate(files, start=1):
        keys = [key for key, info in checkpoint.tensors.items() if info.file == file]
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        yield _Shard(name, dict(checkpoint.read(keys)), lambda tensors: tensors)


def _zero_totals(record: RecoveryRecord) -> dict[str, float]:
    """Totals over the pruned linears."""
    linears: list[LinearMask] = list(record.linears.values())
    weights = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    zeros = sum(linear.zeros_after for linear in linears)
    return {"weights": weights, "zeros": zeros, "sparsity": zeros / weights if weights else 0.0}


_TRAINED: dict[Mode, str] = {
    "lora": "low-rank layers added to its linears (LoRA)",
    "masked": "all its weights except the pruned ones",
    "full": "all its weights",
    "scales": "the row scales and column steps of its linears, norm weights and biases",
}
_KEPT: dict[Mode, str] = {
    "lora": "Every pruned weight is still zero",
    "masked": "Every pruned weight is still zero",
    "full": "Its shapes are those of the smaller model",
    "scales": "All integers are those of the compressed model",
}


def checkpoint_card(record: RecoveryRecord, card: str | None) -> str:
    """The pruned model's card with a section about its recovery."""
    section = f"{_section(record)} Figures are in `{record.FILE}`."
    return extended_card(card, "Recovery", section, name=f"{source_name(record)}, recovered")


def adapter_card(record: RecoveryRecord, base: str, source: Path) -> str:
    """The card of an adapter, with the fields that the cards of peft have."""
    return result_card(
        record,
        "adapter",
        [_section(record)],
        tags=["lora", "pruned", "sparse"],
        fields={"base_model": base, "library_name": "peft"},
        source=source,
    )


def _section(record: RecoveryRecord) -> str:
    target = "the dense model" if record.teacher is not None else "the text alone"
    mode, inputs = record.recipe.mode, record.inputs
    return (
        f"Recovered by prunus. Trained: {_TRAINED[mode]}, on {inputs.text}, "
        f"{bos_words(inputs.bos)}, learning from {target}. {_KEPT[mode]}."
    )
