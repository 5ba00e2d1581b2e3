"""The story of one recovery: a pruned checkpoint and text in, a better one with the same zeros out.

pruned checkpoint ──► model ──► what is trained (the mode)
                                      │
text ──► windows ──────────────► training loop ◄── teacher (the dense model), if any
                                      │
                best weights ──► zeros checked weight by weight ──► result and record
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prunus.distributed import Ranks, process_group
from prunus.hardware.memory import keep_freed_memory, peak_memory
from prunus.model.adapter import CONFIG_NAME, save_adapter
from prunus.model.checkpoint.atomic_files import (
    fsync_folder,
    make_folder,
    remove_temporaries,
    write_text,
)
from prunus.model.checkpoint.output_folder import check_apart, check_disk
from prunus.model.checkpoint.reader import INDEX_NAME, resolve_folder
from prunus.model.experts import split_loaded_experts
from prunus.model.linears import Linear
from prunus.model.loading import load_model
from prunus.model.names import stored_names
from prunus.recovery.card import adapter_card, checkpoint_card
from prunus.recovery.checkpoints import Checkpoints, TrainingState
from prunus.recovery.compressed_result import write_compressed
from prunus.recovery.job import (
    RecoveryJob,
    check_ranks,
    default_mode,
    find_earlier_recovery,
    plan_recovery,
)
from prunus.recovery.lora import lora
from prunus.recovery.masks import block_linears, pruned_linears, unpruned_linears
from prunus.recovery.options import recovery_options
from prunus.recovery.output import ResultFolder
from prunus.recovery.record import LinearMask, RecoveryRecord
from prunus.recovery.scales import dense_size, scales, trained_tensors
from prunus.recovery.trainable import Trainable, full, masked
from prunus.recovery.training import Step, train
from prunus.runs.lock import locked_output
from prunus.runs.progress_bar import Shown, shows_progress

__all__ = ["recover"]

# Up to this many tokens per window, the fused attention of torch is slower on a CPU than two
# batched matrix products.
_MAX_EAGER_TOKENS = 512


def _shown(step: Step) -> Shown:
    """What the progress bar shows after a step."""
    loss = "" if step.loss is None else f", loss {step.loss:.3f}"
    return Shown(min(step.fraction, 1.0), f"{step.tokens:,} tokens{loss}")


@shows_progress("recover", _shown)
def recover(
    model: str | Path,
    output: str | Path,
    mode: str | None = None,
    *,
    teacher: str | Path | None = None,
    device: str = "auto",
    data_dir: str | Path | None = None,
    overwrite: bool = False,
    resume: bool | None = None,
    ranks: Ranks | None = None,
    rank_timeout: float | None = None,
    progress: Callable[[Step], None] | bool | None = True,
    **options: Any,
) -> RecoveryRecord:
    """Win back quality of a pruned or compressed checkpoint by a short training.

    Args:
        model: folder or hub id of a pruned or compressed checkpoint. It is not changed.
        output: folder of the result: a checkpoint with the same zeros, or, in mode lora, a peft
            adapter.
        mode: lora (low-rank layers added to the query and value projections, as a peft adapter),
            masked (all weights except the pruned ones), full (all weights of a model without
            zeros, such as a smaller one), or scales (scales, steps, norms and biases of a
            compressed checkpoint). None is scales for a compressed checkpoint, and an error for
            all others.
        teacher: folder or hub id of the dense model. The pruned model learns its logits in place of
            the text, or together with it (`distill_weight`).
        device: auto, cpu, cuda or cuda:i.
        data_dir: folder with local copies of the datasets.
        overwrite: replace an earlier result of `recover` in `output`.
        resume: True insists on an unfinished recovery in `output`, False refuses one. By default it
            is resumed if it matches.
        ranks: processes that split the windows of each step, all with `output`. None stands for
            the processes that torchrun started.
        rank_timeout: seconds without a heartbeat after which a rank counts as lost. Default 600.
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called after every step and evaluation with a `prunus.recovery.Step`.
        **options: further fields of `RecoveryOptions`: text, tokens, minutes, seqlen, batch,
            learning_rate, warmup, weight_decay, seed, bos, held_out, evaluations, patience,
            distill_weight, rank, alpha, target_modules, dtype.

    Returns:
        The record, which is also written to `prunus-recovery.json`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, ModuleNotFoundError,
        OSError: before any work if possible. The message says what was given, what is wrong and
            what to do.
        ValueError: the loss was not finite. If an earlier evaluation was better than the start, its
            weights are the result in `output` nevertheless.
        RuntimeError: a pruned weight would not be zero; no index is written.
    """
    with contextlib.ExitStack() as stack:
        if ranks is None:
            ranks = stack.enter_context(process_group(rank_timeout))
        started = time.perf_counter()
        with ranks.fail_together():
            chosen = recovery_options({"mode": mode or default_mode(model), **options})
        check_ranks(chosen, ranks)

        def look() -> None:
            check_apart(Path(output), Path(model))
            find_earlier_recovery(Path(output), chosen, overwrite, resume)

        # What the folder holds decides what is done, so from here on no other run may change it.
        stack.enter_context(locked_output(Path(output), ranks, look))
        with ranks.fail_together():
            job = plan_recovery(
                model,
                Path(output),
                chosen,
                teacher=teacher,
                device=device,
                data_dir=Path(data_dir) if data_dir is not None else None,
                overwrite=overwrite,
                resume=resume,
                processes=ranks.local_size,
            )
        checkpoints = Checkpoints(job.output, writes=ranks.rank == 0)
        if job.record.state == "finished":
            checkpoints.clear()  # A kill right after the end leaves them.
            return job.record
        student = _load_student(job, _base_name(model))
        dense = _load_teacher(job)
        # Nothing is written until both models are loaded: most mistakes show before that.
        ranks.on_rank_0(lambda: _claim_output(job, student.trainable, overwrite))
        state = train(
            student.trainable,
            job.text,
            chosen,
            job.dtype,
            dense,
            checkpoints,
            progress if callable(progress) and ranks.rank == 0 else None,
            ranks,
        )
        _fill_record(job.record, state, student)
        if state.diverged and state.best == 0:
            raise ValueError(
                f"training stopped: {state.stopped}, and no evaluation before was better than "
                f"the start. {job.output} holds no result; use a smaller --learning-rate, with "
                "--overwrite"
            )

        # All ranks hold the same weights, so one of them writes.
        def write_result() -> str:
            _write_result(job, student)
            return _finish_record(job, checkpoints, started).model_dump_json()

        return RecoveryRecord.model_validate_json(ranks.on_rank_0(write_result))


@dataclass(frozen=True)
class _Student:
    """The pruned model in training.

    Attributes:
        trainable: model and trained parameters.
        pruned: its pruned linears by full name, whose zeros are checked at the end. Empty in modes
            lora, which changes none of them, and full, whose model has none.
        parameters: number of parameters of the pruned checkpoint.
        base: what an adapter names as its base model.
        stored: in mode scales, stored name -> the model's name of each tensor that is trained.
    """

    trainable: Trainable
    pruned: Mapping[str, Linear]
    parameters: int
    base: str
    stored: Mapping[str, str] = field(default_factory=dict)


def _load_student(job: RecoveryJob, base: str) -> _Student:
    """Load the pruned model and make it trainable by the mode."""
    options, folder = job.options, job.source.checkpoint.folder
    if job.device.type == "cpu":
        # Each step frees and allocates the logits. glibc would give them back to the system.
        keep_freed_memory()
    # In modes lora and scales no matrix is updated, so they need not be float32.
    dtype = job.dtype if options.mode in ("lora", "scales") else torch.float32
    model = load_model(folder, dtype, attention=_attention(job)).to(job.device)
    parameters = dense_size(model)
    if options.mode == "scales":
        trainable = scales(model, job.dtype)
        names = stored_names(model, job.source.checkpoint.tensors, trained_tensors(trainable))
        return _Student(trainable, {}, parameters, base, names)
    if options.mode == "lora":
        trainable = lora(
            model,
            block_linears(model),
            options.target_modules,
            options.rank,
            options.alpha,
            options.seed,
            base,
        )
        return _Student(trainable, {}, parameters, base)
    # Results are written expert by expert, and zeros are kept in every one of them.
    split_loaded_experts(model)
    if options.mode == "full":
        trainable = full(model, unpruned_linears(model, folder))
        return _Student(trainable, {}, parameters, base)
    pruned = pruned_linears(model, folder)
    return _Student(masked(model, pruned), pruned, parameters, base)


def _load_teacher(job: RecoveryJob) -> Any:
    """The dense model, or None."""
    if job.teacher is None:
        return None
    folder = job.teacher.checkpoint.folder
    teacher = load_model(folder, job.dtype, attention=_attention(job)).to(job.device)
    teacher.requires_grad_(False)
    return teacher


def _attention(job: RecoveryJob) -> str | None:
    """The implementation of attention; None for that of the checkpoint."""
    short = job.options.seqlen <= _MAX_EAGER_TOKENS
    return "eager" if job.device.type == "cpu" and short else None


def _claim_output(job: RecoveryJob, trainable: Trainable, overwrite: bool) -> None:
    """Create the folder and write the record into it.

    The index of an earlier result is removed, and with `overwrite` its shards and configurations,
    so that no mixture of two results looks whole.
    """
    check_disk(job.output, _disk_bytes(job, trainable))
    make_folder(job.output)
    job.record.save(job.output)
    (job.output / INDEX_NAME).unlink(missing_ok=True)
    fsync_folder(job.output)
    remove_temporaries(job.output)
    if overwrite:
        for path in job.output.iterdir():
            if path.suffix == ".safetensors" or path.name in ("config.json", CONFIG_NAME):
                path.unlink()


def _disk_bytes(job: RecoveryJob, trainable: Trainable) -> int:
    """Disk space for the result and, until it is written, for the checkpoints of the training.

    A checkpoint holds float32 weights and two moments; the best weights lie in a file of their own.
    """
    trained = sum(p.numel() for p in trainable.parameters.values())
    return 16 * trained + (0 if job.options.mode == "lora" else job.stored_bytes)


def _fill_record(record: RecoveryRecord, state: TrainingState, student: _Student) -> None:
    """Enter what the training did."""
    record.evaluations, record.best = state.evaluations, state.best
    record.stopped, record.diverged = state.stopped, state.diverged
    trainable = student.trainable
    trained = sum(p.numel() for p in trainable.parameters.values())
    # Pruned weights belong to trained parameters but are not trained.
    trained -= sum(m.numel() - int(torch.count_nonzero(m)) for m in trainable.masks.values())
    record.totals = {
        "parameters": student.parameters,
        "trained_parameters": trained,
        "added_parameters": trainable.added,
        "added_share": trainable.added / student.parameters,
        "peak_learning_rate": record.options.peak_rate(trainable.weight_rms),
        "tokens": state.tokens,
        "seconds": round(state.seconds, 2),
        "held_out_perplexity_before": state.evaluations[0].perplexity,
        "held_out_perplexity_after": state.evaluations[state.best].perplexity,
    }


def _write_result(job: RecoveryJob, student: _Student) -> None:
    """Write the adapter, or the checkpoint with its zeros checked."""
    record, model = job.record, student.trainable.model
    if job.options.mode == "lora":
        record.sha256 = save_adapter(model, job.output)
        write_text(job.output / "README.md", adapter_card(record, student.base))
        return
    card = checkpoint_card(record, job.source.checkpoint.folder.name, job.card)
    if job.options.mode == "scales":
        trained = trained_tensors(student.trainable)
        changed = {key: trained[name] for key, name in student.stored.items()}
        record.sha256 = write_compressed(job.output, job.source.checkpoint, changed, card)
        return
    # A tied head and embedding are one parameter with two names; both may be stored.
    changed = dict(model.named_parameters(remove_duplicate=False))
    assert job.skeleton is not None
    result = ResultFolder(job.output, job.source, job.skeleton)
    record.linears = result.write_shards(changed, student.pruned)
    record.sha256 = result.sha256
    record.totals |= _zero_totals(record.linears)
    result.finish(card)


def _zero_totals(linears: Mapping[str, LinearMask]) -> dict[str, Any]:
    """Totals over the pruned linears."""
    weights = sum(linear.shape[0] * linear.shape[1] for linear in linears.values())
    zeros = sum(linear.zeros_after for linear in linears.values())
    return {"weights": weights, "zeros": zeros, "sparsity": zeros / weights if weights else 0.0}


def _finish_record(job: RecoveryJob, checkpoints: Checkpoints, started: float) -> RecoveryRecord:
    """Write the record of a result that is in place, and delete the checkpoints."""
    record = job.record
    record.totals |= {
        "seconds_this_time": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": peak_memory(),
    }
    record.state = "finished"
    record.save(job.output)
    checkpoints.clear()
    if record.diverged:
        best = record.evaluations[record.best or 0]
        raise ValueError(
            f"training stopped: {record.stopped}. {job.output} holds the weights of step "
            f"{best.step}, the best until then; use a smaller --learning-rate"
        )
    return record


def _base_name(model: str | Path) -> str:
    """What an adapter names as its base model.

    This is the absolute path of a folder, which is found from any directory, or a hub id.
    """
    return str(resolve_folder(model).resolve()) if Path(model).is_dir() else str(model)
