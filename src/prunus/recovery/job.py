"""Everything that is checked and decided before a recovery does any work.

What can fail later for a reason that is known now fails here, before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.calibration.sources import find_source
from prunus.calibration.training_text import TrainingText, training_text
from prunus.calibration.windows import Wanted, check_context
from prunus.distributed import Ranks
from prunus.hardware.memory import describe_hardware, versions
from prunus.model.adapter import CONFIG_NAME, is_adapter, require_peft
from prunus.model.checkpoint.companions import check_companions
from prunus.model.checkpoint.output_folder import check_apart, check_resume, check_whole, is_vacant
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.checkpoint.regular_files import read_card
from prunus.model.device import choose_device
from prunus.model.kinds import require_causal
from prunus.model.loading import load_model
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.model.tokenizer import load_tokenizer
from prunus.packed.source import is_packed
from prunus.recovery.compressed_result import is_compressed
from prunus.recovery.options import MODES, Mode, RecoveryOptions
from prunus.recovery.record import RECORD_NAME, RecoveryInputs, RecoveryRecord
from prunus.recovery.teacher import check_vocabulary
from prunus.recovery.training import step_count, training_dtype

__all__ = [
    "RecoveryJob",
    "check_ranks",
    "check_teacher",
    "default_mode",
    "draw_training_text",
    "find_earlier_recovery",
    "open_checkpoint",
    "plan_recovery",
]


@dataclass(frozen=True)
class RecoveryJob:
    """A checked recovery.

    Attributes:
        options: how the model is recovered.
        output: where the result goes.
        source: the pruned or compressed checkpoint.
        skeleton: the model without weights, to which the source is bound; None in mode scales.
        teacher: the dense checkpoint, or None.
        text: windows to train on and held-out windows.
        device, dtype: of matrix products.
        record: a new one, or that of the unfinished or finished recovery in `output`.
        card: the pruned model's README.md, or None.
    """

    options: RecoveryOptions
    output: Path
    source: CheckpointSource
    skeleton: Skeleton | None
    teacher: CheckpointSource | None
    text: TrainingText
    device: torch.device
    dtype: torch.dtype
    record: RecoveryRecord
    card: str | None

    @property
    def stored_bytes(self) -> int:
        """Size of all tensors of the pruned checkpoint in bytes."""
        checkpoint = self.source.checkpoint
        return checkpoint.nbytes(checkpoint.tensors)


def default_mode(model: str | Path) -> str:
    """Return the mode for a checkpoint if none is given: scales for a compressed one.

    Raises:
        ValueError: the checkpoint is not compressed, so that a mode must be given.
        FileNotFoundError: there is no such checkpoint.
    """
    if is_compressed(resolve_folder(model)):
        return "scales"
    raise ValueError(f"mode is missing; give one of {', '.join(MODES)}")


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
    processes: int = 1,
) -> RecoveryJob:
    """Check everything that can be checked and decide what is left open; nothing is written.

    Args:
        model, output, teacher, device, data_dir, overwrite, resume: see `prunus.recover`.
        options: how the model is recovered.
        processes: how many processes of the run are on this host.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, NotImplementedError, ModuleNotFoundError,
        OSError: each message says what was given, what is wrong and what to do.
    """
    earlier = find_earlier_recovery(output, options, overwrite, resume)
    if options.mode == "lora":
        require_peft()
    find_source(options.text).check(
        Wanted(samples=1, seqlen=options.seqlen, bos=options.bos, data=data_dir)
    )
    folder = resolve_folder(model)
    _check_trainable_form(folder, options.mode)
    check_apart(output, folder)
    if options.mode != "lora":  # an adapter copies nothing
        check_companions(folder)
    card = read_card(folder / "README.md")
    chosen_device = choose_device(device, processes=processes)
    skeleton = None
    if options.mode == "scales":
        source = CheckpointSource(folder, quantized=True)
        require_causal(source.config, "prunus recover")
    else:
        source, skeleton = open_checkpoint(folder)
    dense = None
    if teacher is not None:
        dense_folder = resolve_folder(teacher)
        check_teacher(dense_folder)
        check_apart(output, dense_folder)
        dense, _ = open_checkpoint(dense_folder)
        check_vocabulary(source, dense)
    elif options.distill_weight != 1:
        raise ValueError(
            f"distill_weight {options.distill_weight} weighs a teacher, and there is none: "
            "give the dense model with --teacher"
        )
    dtype, reason = training_dtype(options.dtype, chosen_device)
    text = draw_training_text(options, source, dense, chosen_device, data_dir)
    inputs = RecoveryInputs(
        checkpoint=source.fingerprint,
        teacher=dense.fingerprint if dense is not None else None,
        text=text.source,
        text_sha256=text.sha256,
        dtype=str(dtype).removeprefix("torch."),
        dtype_reason=reason,
        device=chosen_device.type,
        bos=text.bos,
    )
    if earlier is not None:
        earlier.check_same(options, inputs)
        if earlier.state == "finished" and options.mode != "lora":
            check_whole(output)
    record = earlier or RecoveryRecord(
        source=str(model),
        teacher=str(teacher) if teacher is not None else None,
        options=options,
        inputs=inputs,
        versions=versions(),
        hardware=describe_hardware(chosen_device),
    )
    return RecoveryJob(
        options, output, source, skeleton, dense, text, chosen_device, dtype, record, card
    )


def check_ranks(options: RecoveryOptions, ranks: Ranks) -> None:
    """Check that several processes can split this training.

    Raises:
        ValueError: they cannot; the message says why and what to do.
    """
    if ranks.size == 1:
        return
    if options.batch < ranks.size:
        raise ValueError(
            f"a step of {options.batch} windows cannot be split over {ranks.size} ranks: "
            f"give --batch {ranks.size} or more"
        )
    if options.minutes is not None:
        raise ValueError(
            f"--minutes {options.minutes:g} would end at a different step on each of "
            f"{ranks.size} ranks, because their clocks differ: give --tokens"
        )


def find_earlier_recovery(
    output: Path, options: RecoveryOptions, overwrite: bool, resume: bool | None
) -> RecoveryRecord | None:
    """The record of an earlier attempt in the output folder; None for a fresh start.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: the recovery may not write into the folder.
    """
    earlier = None
    if not is_vacant(output):
        if not (output / RECORD_NAME).exists():
            raise FileExistsError(
                f"output {output} exists and holds no result of prunus recover; "
                "it is left as it is. Choose another folder"
            )
        earlier = None if overwrite else RecoveryRecord.load(output)
    unfinished = earlier is not None and earlier.state == "running"
    check_resume(output, unfinished, resume, "recovery")
    if earlier is not None:
        earlier.check_same(options)
    return earlier


def _check_trainable_form(folder: Path, mode: Mode) -> None:
    """Check that a folder holds a checkpoint whose weights a mode can train.

    Raises:
        ValueError: it does not; the message says what to do.
    """
    _check_no_adapter(folder)
    compressed = is_compressed(folder)
    if mode == "scales" and not compressed:
        others = ", ".join(other for other in MODES if other != "scales")
        raise ValueError(
            f"{folder} has no quantised linears, and mode scales trains nothing else: compress it "
            f"first (prunus compress), or give one of the modes {others}"
        )
    if mode != "scales" and compressed:
        raise ValueError(
            f"{folder} is compressed, and mode {mode} cannot train packed weights: give --mode "
            f"scales, or expand it first (prunus unpack {folder} DEST)"
        )
    if mode != "scales" and is_packed(folder):
        raise ValueError(
            f"{folder} is packed, and packed weights cannot be trained: "
            f"prunus unpack {folder} DEST first"
        )


def check_teacher(folder: Path) -> None:
    """Check that a folder holds a model that can teach.

    Raises:
        ValueError: it does not; the message says what to do.
    """
    _check_no_adapter(folder)
    if is_packed(folder):
        raise ValueError(
            f"the teacher {folder} is packed; give the dense model that it was made from, or "
            f"expand it first (prunus unpack {folder} DEST)"
        )


def _check_no_adapter(folder: Path) -> None:
    if is_adapter(folder):
        raise ValueError(
            f"{folder} is an adapter ({CONFIG_NAME}), not a checkpoint; "
            "give the model that it is for"
        )


def open_checkpoint(folder: Path) -> tuple[CheckpointSource, Skeleton]:
    """Open a checkpoint, bound to the skeleton of its model.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError: it is damaged, or no causal LM.
    """
    source = CheckpointSource(folder)
    require_causal(source.config, "prunus recover")
    skeleton = Skeleton(source.config, source.stored_dtype)
    source.bind(skeleton)
    return source, skeleton


def draw_training_text(
    options: RecoveryOptions,
    source: CheckpointSource,
    dense: CheckpointSource | None,
    device: torch.device,
    data_dir: Path | None,
) -> TrainingText:
    """Draw the windows of the text, and check that they fit the model.

    Args:
        options: source, windows and budget.
        source: the model in training, whose tokenizer cuts the text.
        dense: the teacher, or None.
        device: where a model runs that writes the text itself.
        data_dir: folder with local copies of the datasets.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError, OSError: see `training_text`.
    """
    config = source.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    check_context(positions if isinstance(positions, int) else None, options.seqlen)

    def load_writer() -> Any:
        """The model that writes the text of source `self`: the dense one if there is one."""
        return load_model((dense or source).checkpoint.folder).to(device)

    steps = step_count(options)
    text = training_text(
        options.text,
        tokenizer=lambda: load_tokenizer(source.checkpoint.folder),
        seqlen=options.seqlen,
        held_out=options.held_out,
        seed=options.seed,
        data=data_dir,
        model=load_writer,
        windows=steps * options.batch if steps is not None else None,
        bos=options.bos,
    )
    largest = int(torch.cat([text.held_out, text.windows(0, 1)]).max())
    if largest >= config.vocab_size:
        raise ValueError(
            f"token id {largest} is outside the model's vocabulary of {config.vocab_size}: the "
            "tokenizer or the file of ids belongs to another model"
        )
    return text
