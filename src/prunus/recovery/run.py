"""The story of one recovery: a pruned checkpoint and text in, a better one with the same zeros out.

checkpoint ──► what is trained (a mode) ──► training loop ──► best weights ──► compared weight by weight ──► result
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prunus.distributed import Ranks, process_group
from prunus.hardware.memory import keep_freed_memory, peak_memory
from prunus.hardware.sizes import parse_bytes
from prunus.model.adapter import CONFIG_NAME, save_adapter
from prunus.model.checkpoint.atomic_files import (
    TEMPORARY_SUFFIX,
    fsync_folder,
    make_folder,
    write_text,
)
from prunus.model.checkpoint.lock import clear_stale_lock, locked
from prunus.model.checkpoint.output_folder import check_disk
from prunus.model.checkpoint.reader import INDEX_NAME, resolve_folder
from prunus.model.linears import Linear
from prunus.model.loading import load_model
from prunus.pruning.output import shard_name
from prunus.recovery.blockwise import match_blocks
from prunus.recovery.card import adapter_card, checkpoint_card
from prunus.recovery.checkpoints import Checkpoints, TrainingState
from prunus.recovery.job import RecoveryJob, check_ranks, plan_recovery
from prunus.recovery.lora import choose, lora
from prunus.recovery.masks import block_linears, head_name, pruned_linears, recorded_linears
from prunus.recovery.options import recovery_options
from prunus.recovery.output import ResultFolder
from prunus.recovery.record import RecoveryRecord
from prunus.recovery.sparse_lora import merged_weights, sparse_lora
from prunus.recovery.trainable import Trainable, masked
from prunus.recovery.training import Step, train

__all__ = ["recover"]

# Up to so many tokens per window, torch's fused attention is slower on a CPU than two batched products.
_SHORT = 512


def recover(
    model: str | Path,
    output: str | Path,
    mode: str,
    *,
    teacher: str | Path | None = None,
    device: str = "auto",
    data_dir: str | Path | None = None,
    overwrite: bool = False,
    resume: bool | None = None,
    memory: int | str | None = None,
    ranks: Ranks | None = None,
    rank_timeout: float | None = None,
    progress: Callable[[Step], None] | None = None,
    **options: Any,
) -> RecoveryRecord:
    """Win back quality of a pruned checkpoint by a short training.

    Args:
        model: folder or hub id of a pruned checkpoint; it is not changed.
        output: folder of the result: a checkpoint with the same zeros, or, for lora, a peft adapter.
        mode: lora (low-rank layers beside query and value projections, kept apart), sparse-lora (low-rank updates
            of surviving weights, merged), masked (all surviving weights), block (block by block, without
            backpropagation through the model).
        teacher: folder or hub id of the dense model. Its logits are learnt in place of the text, or beside it
            (`distill_weight`); in mode block its blocks' outputs, by default of the model that was pruned.
        device: auto, cpu, cuda or cuda:i.
        data_dir: local mirror of the corpora.
        overwrite: replace an earlier result of recover in `output`.
        resume: True insists on an unfinished recovery in `output`, False refuses one; by default it is resumed if
            it matches.
        memory: budget of mode block, such as "8GB" or bytes; default what is free. The other modes need the whole model.
        ranks: processes that share each step's windows, all with `output`; None for those that torchrun started.
        rank_timeout: seconds after which one of them that gives no sign of life counts as lost; default 600.
        progress: called after every step, evaluation and block.
        **options: further fields of `RecoveryOptions`: text, tokens, minutes, seqlen, batch, learning_rate, warmup,
            weight_decay, seed, held_out, evaluations, patience, distill_weight, rank, alpha, targets, passes, dtype.

    Returns:
        The record, also written to `prunus-recovery.json`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, ModuleNotFoundError, OSError: before any
            work where possible; the message says what was given, what is wrong and what to do.
        ValueError: the loss was not finite. Where an evaluation before that was better than the start, its weights
            are the result in `output` all the same.
        RuntimeError: a pruned weight would not be zero; nothing is written.
    """
    if ranks is None:
        with process_group(rank_timeout) as started_ranks:
            return recover(
                model,
                output,
                mode,
                teacher=teacher,
                device=device,
                data_dir=data_dir,
                overwrite=overwrite,
                resume=resume,
                memory=memory,
                ranks=started_ranks,
                progress=progress,
                **options,
            )
    started = time.perf_counter()
    chosen = recovery_options({"mode": mode, **options})
    if memory is not None and chosen.mode != "block":
        raise ValueError(
            f"mode {chosen.mode} trains the whole model in memory; a memory budget is for mode block. Leave it out"
        )
    budget = parse_bytes(memory) if isinstance(memory, str) else memory
    check_ranks(chosen, ranks)
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
        )
    checkpoints = Checkpoints(job.output, writes=ranks.rank == 0)
    if job.record.state == "finished":
        checkpoints.clear()  # a kill right after the end leaves them
        clear_stale_lock(job.output)
        return job.record
    with locked(job.output):
        if chosen.mode == "block":
            _recover_blocks(job, overwrite, progress, budget)
            return _close(job, output, checkpoints, started)
        write = _recover_whole(job, checkpoints, overwrite, progress, _base_name(model), ranks)

        def finish() -> str:
            write()
            return _close(job, output, checkpoints, started).model_dump_json()

        return RecoveryRecord.model_validate_json(ranks.on_rank_0(finish))


def _close(
    job: RecoveryJob, output: str | Path, checkpoints: Checkpoints, started: float
) -> RecoveryRecord:
    """The record of a recovery whose result is in place, finished and written."""
    record = job.record
    record.totals |= {
        "seconds_this_time": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": peak_memory(),
    }
    record.state = "finished"
    record.save(job.output)
    checkpoints.clear()
    if record.diverged:
        raise ValueError(
            f"training stopped: {record.stopped}. {output} holds the weights of step "
            f"{record.evaluations[record.best or 0].step}, the best until then; use a smaller --learning-rate"
        )
    return record


def _recover_blocks(
    job: RecoveryJob, overwrite: bool, progress: Callable[[Step], None] | None, memory: int | None
) -> None:
    assert job.teacher is not None and job.teacher_skeleton is not None
    check_disk(job.output, job.source.checkpoint.nbytes(job.source.checkpoint.tensors))
    result = ResultFolder(job.output, job.source, job.skeleton, job.record)
    _begin(job, overwrite)
    match_blocks(
        job.options,
        (job.source, job.skeleton),
        (job.teacher, job.teacher_skeleton),
        job.text,
        job.device,
        job.dtype,
        result,
        progress,
        memory,
    )
    record = job.record
    record.linears = {
        f"{block.name}.{name}": x for block in record.blocks for name, x in block.linears.items()
    }
    head = head_name(job.skeleton.model)
    known = recorded_linears(job.source.checkpoint.folder, head) or set()
    record.linears |= result.write_outside({}, [head] if head in known and head is not None else [])
    result.finish(checkpoint_card(record, job.source.checkpoint.folder))
    errors = [(b.error_before, b.error_after) for b in record.blocks if b.error_before is not None]
    record.totals = _zeros(record) | {
        "tokens": sum(block.steps for block in record.blocks)
        * job.options.batch
        * job.options.seqlen
        // len(record.blocks),
        "seconds": round(sum(block.seconds for block in record.blocks), 2),
        "mean_error_before": sum(before for before, _ in errors) / len(errors),
        "mean_error_after": sum(after or 0.0 for _, after in errors) / len(errors),
    }


def _recover_whole(
    job: RecoveryJob,
    checkpoints: Checkpoints,
    overwrite: bool,
    progress: Callable[[Step], None] | None,
    base: str,
    ranks: Ranks,
) -> Callable[[], None]:
    """Train all that the mode trains, at once; returns what writes the result."""
    options, folder = job.options, job.source.checkpoint.folder
    stays = options.mode == "lora"
    attention = None
    if job.device.type == "cpu":
        keep_freed_memory()
        if options.seqlen <= _SHORT:
            attention = "eager"
    model = load_model(folder, job.dtype if stays else torch.float32, attention=attention).to(
        job.device
    )
    parameters = sum(p.numel() for p in model.parameters())
    linears: dict[str, Linear] = {} if stays else pruned_linears(model, folder)
    updated = (
        choose(linears, options.targets) if options.targets is not None and not stays else linears
    )
    if stays:
        trainable = lora(
            model,
            block_linears(model),
            options.targets,
            options.rank,
            options.alpha,
            options.seed,
            base,
        )
    elif options.mode == "sparse-lora":
        trainable = sparse_lora(model, updated, options.rank, options.alpha, options.seed)
    else:
        trainable = masked(model, linears)
    teacher = None
    if job.teacher is not None:
        teacher = load_model(job.teacher.checkpoint.folder, job.dtype, attention=attention).to(
            job.device
        )
        teacher.requires_grad_(False)

    def begin() -> None:
        check_disk(job.output, _disk(job, trainable))
        _begin(job, overwrite)

    ranks.on_rank_0(begin)
    tell = progress if ranks.rank == 0 else None
    state = train(trainable, job.text, options, job.dtype, teacher, checkpoints, tell, ranks)
    record = job.record
    _enter(record, state, trainable, parameters)
    if state.diverged and state.best == 0:
        raise ValueError(
            f"training stopped: {state.stopped}, and nothing was better before than at the start. {job.output} holds "
            "no result; use a smaller --learning-rate, with --overwrite"
        )

    def write() -> None:
        if stays:
            save_adapter(trainable.model, job.output)
            write_text(job.output / "README.md", adapter_card(record, base))
            return
        result = ResultFolder(job.output, job.source, job.skeleton, record)
        changed: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        if options.mode == "sparse-lora":
            changed = merged_weights(updated)
        record.linears = _write(job, result, changed, linears)
        record.totals |= _zeros(record)
        result.finish(checkpoint_card(record, folder))

    return write


def _write(
    job: RecoveryJob,
    result: ResultFolder,
    changed: dict[str, torch.Tensor],
    linears: dict[str, Linear],
) -> dict[str, Any]:
    """All shards; returns the pruned linears, compared."""
    found, inside = dict[str, Any](), set[str]()
    for index in range(len(job.skeleton)):
        prefix = f"{job.skeleton.block_name(index)}."
        new = {
            name.removeprefix(prefix): x for name, x in changed.items() if name.startswith(prefix)
        }
        pruned = [name.removeprefix(prefix) for name in linears if name.startswith(prefix)]
        inside |= {f"{prefix}{name}" for name in pruned}
        _, records = result.write_block(index, new, pruned)
        found |= {f"{prefix}{name}": entry for name, entry in records.items()}
    return found | result.write_outside(changed, [name for name in linears if name not in inside])


def _begin(job: RecoveryJob, overwrite: bool) -> None:
    """Create the folder and claim it; what an earlier result left goes, so that no half of one looks whole."""
    make_folder(job.output)
    blocks = job.record.blocks
    whole = next(
        (i for i in range(len(blocks)) if not (job.output / shard_name(i)).exists()), len(blocks)
    )
    del blocks[whole:]  # somebody took a shard away: what comes after it is made again too
    job.record.save(job.output)
    (job.output / INDEX_NAME).unlink(missing_ok=True)
    fsync_folder(job.output)
    for path in job.output.iterdir():
        earlier = path.suffix == ".safetensors" or path.name in ("config.json", CONFIG_NAME)
        if path.name.endswith(TEMPORARY_SUFFIX) or (overwrite and earlier):
            path.unlink()


def _enter(
    record: RecoveryRecord, state: TrainingState, trainable: Trainable, parameters: int
) -> None:
    record.evaluations, record.best = state.evaluations, state.best
    record.stopped, record.diverged = state.stopped, state.diverged
    trained = sum(p.numel() for p in trainable.parameters.values())
    trained -= sum(x.numel() - int(torch.count_nonzero(x)) for x in trainable.supports.values())
    record.totals = {
        "parameters": parameters,
        "trained_parameters": trained,
        "added_parameters": trainable.added,
        "added_share": trainable.added / parameters,
        "peak_learning_rate": record.options.peak_rate(trainable.size),
        "tokens": state.tokens,
        "seconds": round(state.seconds, 2),
        "held_out_perplexity_before": state.evaluations[0].perplexity,
        "held_out_perplexity_after": state.evaluations[state.best].perplexity,
    }


def _zeros(record: RecoveryRecord) -> dict[str, Any]:
    """Totals over the pruned linears."""
    weights = sum(x.shape[0] * x.shape[1] for x in record.linears.values())
    zeros = sum(x.zeros_after for x in record.linears.values())
    return {"weights": weights, "zeros": zeros, "sparsity": zeros / weights if weights else 0.0}


def _disk(job: RecoveryJob, trainable: Trainable) -> int:
    """Bytes for the result and, until it is there, for weights, two moments and the best weights in float32."""
    trained = sum(p.numel() for p in trainable.parameters.values())
    checkpoint = job.source.checkpoint
    return 16 * trained + (
        0 if job.options.mode == "lora" else checkpoint.nbytes(checkpoint.tensors)
    )


def _base_name(model: str | Path) -> str:
    """How an adapter names its base: a folder by its whole path, so that it is found from anywhere; a hub id as it is."""
    return str(resolve_folder(model).resolve()) if Path(model).is_dir() else str(model)
