"""Everything that is looked at and decided before a recovery does any work: whatever would fail later, fails here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.calibration import check_source
from prunus.calibration.stream import TrainingText, training_text
from prunus.distributed import Ranks
from prunus.hardware.memory import describe_hardware, versions
from prunus.model.adapter import CONFIG_NAME, is_adapter, require_peft
from prunus.model.checkpoint.atomic_files import read_json
from prunus.model.checkpoint.output_folder import check_apart, check_whole, is_vacant
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.device import choose_device
from prunus.model.kinds import require_causal
from prunus.model.loading import load_model
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.model.tokenizer import load_tokenizer
from prunus.pruning.compute_dtype import decide_dtype
from prunus.recovery.blockwise import windows_of
from prunus.recovery.options import RecoveryOptions
from prunus.recovery.record import RECORD_NAME, RecoveryInputs, RecoveryRecord
from prunus.recovery.teacher import check_shapes, check_vocabulary, find_teacher
from prunus.recovery.training import steps_of, training_dtype

__all__ = ["RecoveryJob", "check_ranks", "plan_recovery"]


@dataclass(frozen=True)
class RecoveryJob:
    """A checked recovery.

    Attributes:
        options: what is to be done.
        output: where the result goes.
        source, skeleton: the pruned checkpoint and its model without weights, bound to each other.
        teacher, teacher_skeleton: the dense ones; the skeleton in mode block only.
        text: windows to train on and held-out ones.
        device, dtype: where matrix products are computed, and in what.
        record: new, or that of the attempt that is gone on with.
    """

    options: RecoveryOptions
    output: Path
    source: CheckpointSource
    skeleton: Skeleton
    teacher: CheckpointSource | None
    teacher_skeleton: Skeleton | None
    text: TrainingText
    device: torch.device
    dtype: torch.dtype
    record: RecoveryRecord


def plan_recovery(
    model: str | Path,
    output: Path,
    options: RecoveryOptions,
    *,
    teacher: str | Path | None,
    device: str,
    data_dir: Path | None,
    overwrite: bool,
    resume: bool | None,
) -> RecoveryJob:
    """Check what can be checked and decide what is left open; nothing is written.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, NotImplementedError, ModuleNotFoundError, OSError: each
            message names what was given, what is wrong and what to do.
    """
    earlier = _earlier(output, overwrite, resume)
    if earlier is not None:
        earlier.check_same(options)
    if options.mode == "lora":
        require_peft()
    if options.text != "self" or options.mode != "block":
        check_source(options.text, data_dir)
    folder = resolve_folder(model)
    _refuse_other_forms(folder)
    check_apart(output, folder)
    place = choose_device(device)
    source, skeleton = _open(folder)
    dense = dense_skeleton = None
    if teacher is not None or options.mode == "block":
        dense_folder = find_teacher(teacher, folder)
        _refuse_other_forms(dense_folder)
        check_apart(output, dense_folder)
        dense, dense_skeleton = _open(dense_folder)
        check_vocabulary(source, dense)
        if options.mode == "block":
            check_shapes(skeleton, dense_skeleton, dense_folder)
    elif options.distill_weight != 1:
        raise ValueError(
            "distill_weight weighs what is learnt from a teacher: give the dense model with --teacher"
        )
    dtype, reason = training_dtype(options.dtype, place)
    if options.mode == "block":
        dtype, reason = decide_dtype(options.dtype, source, place, "norms")
        skeleton, dense_skeleton = (
            Skeleton(x.config, dtype) for x in (source, dense) if x is not None
        )
        source.bind(skeleton)
        assert dense is not None
        dense.bind(dense_skeleton)
    text = _text(options, source, dense, place, data_dir)
    inputs = RecoveryInputs(
        checkpoint=source.fingerprint,
        teacher=dense.fingerprint if dense is not None else None,
        text=text.source,
        text_sha256=text.sha256,
        dtype=str(dtype).removeprefix("torch."),
        dtype_reason=reason,
        device=place.type,
    )
    if earlier is not None:
        earlier.check_same(options, inputs)
        if earlier.state == "finished" and options.mode != "lora":
            check_whole(output)
    record = earlier or RecoveryRecord(
        source=str(model),
        teacher=str(dense.checkpoint.folder)
        if dense is not None and teacher is None
        else _text_of(teacher),
        options=options,
        inputs=inputs,
        versions=versions(),
        hardware=describe_hardware(place),
    )
    return RecoveryJob(
        options, output, source, skeleton, dense, dense_skeleton, text, place, dtype, record
    )


def check_ranks(options: RecoveryOptions, ranks: Ranks) -> None:
    """See that several processes can share this training.

    Raises:
        ValueError: says what they cannot share, and what to do.
    """
    if ranks.size == 1:
        return
    if options.mode == "block":
        raise ValueError(
            f"mode block trains one block after the other, a window at a time: {ranks.size} ranks cannot share "
            "that. Run one process, or choose masked, sparse-lora or lora"
        )
    if options.batch < ranks.size:
        raise ValueError(
            f"steps of {options.batch} windows cannot be shared by {ranks.size} ranks: give --batch {ranks.size} or more"
        )
    if options.minutes is not None:
        raise ValueError(
            "clocks of several ranks differ, and so would their steps: give --tokens, not --minutes"
        )


def _text_of(teacher: str | Path | None) -> str | None:
    return None if teacher is None else str(teacher)


def _earlier(output: Path, overwrite: bool, resume: bool | None) -> RecoveryRecord | None:
    """The record of an earlier attempt in the output folder, if it holds one that is to be gone on with."""
    earlier = None
    if not is_vacant(output):
        if not (output / RECORD_NAME).exists():
            raise FileExistsError(
                f"output {output} exists and holds no result of prunus recover; it is left as it is. "
                "Choose another folder"
            )
        earlier = None if overwrite else RecoveryRecord.load(output)
    unfinished = earlier is not None and earlier.state == "running"
    if resume is True and not unfinished:
        raise FileNotFoundError(
            f"there is no unfinished recovery in {output} to resume; leave --resume out to start one"
        )
    if resume is False and unfinished:
        raise FileExistsError(
            f"{output} holds an unfinished recovery; --overwrite starts again, --resume goes on"
        )
    return earlier


def _refuse_other_forms(folder: Path) -> None:
    """Only whole checkpoints can be trained and learnt from.

    Raises:
        ValueError: the folder holds an adapter or a packed model; says what to do.
    """
    if is_adapter(folder):
        raise ValueError(
            f"{folder} is an adapter ({CONFIG_NAME}), not a checkpoint; give the model that it is for"
        )
    path = folder / "config.json"
    config = read_json(path) if path.exists() else {}
    packing = config.get("quantization_config") if isinstance(config, dict) else None
    if isinstance(packing, dict) and packing.get("quant_method") == "prunus":
        raise ValueError(
            f"{folder} is packed, and packed weights cannot be trained: prunus unpack {folder} DEST first"
        )


def _open(folder: Path) -> tuple[CheckpointSource, Skeleton]:
    source = CheckpointSource(folder)
    require_causal(source.config, "prunus recover")
    skeleton = Skeleton(source.config, source.stored_dtype)
    source.bind(skeleton)
    return source, skeleton


def _text(
    options: RecoveryOptions,
    source: CheckpointSource,
    dense: CheckpointSource | None,
    device: torch.device,
    data_dir: Path | None,
) -> TrainingText:
    """Windows of the text, seen to fit the model."""
    folder = source.checkpoint.folder
    config = source.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and options.seqlen > positions:
        raise ValueError(
            f"windows of {options.seqlen} tokens do not fit: the model has {positions} positions. "
            f"Use --seqlen {positions} or less"
        )
    tokenizer: Any = None
    if not options.text.endswith(".safetensors"):
        tokenizer = load_tokenizer(folder)
    windows = windows_of(options) if options.mode == "block" else None
    steps = steps_of(options)
    if windows is None and steps is not None:
        windows = steps * options.batch
    writer: Callable[[], Any] = lambda: load_model((dense or source).checkpoint.folder).to(device)  # noqa: E731
    text = training_text(
        options.text,
        tokenizer=tokenizer,
        seqlen=options.seqlen,
        held_out=options.held_out,
        seed=options.seed,
        data_dir=data_dir,
        model=writer,
        windows=windows,
    )
    largest = int(torch.cat([text.held_out, text.windows(0, 1)]).max())
    if largest >= config.vocab_size:
        raise ValueError(
            f"token id {largest} is outside the model's vocabulary of {config.vocab_size}: the tokenizer or the file "
            "of ids belongs to another model"
        )
    return text
