"""The two models of a recovery in memory: the one that is trained, and the one that teaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prunus.hardware.memory import keep_freed_memory
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.experts import split_loaded_experts
from prunus.model.loading import load_model
from prunus.recovery.job import RecoveryJob
from prunus.recovery.lora import lora
from prunus.recovery.masks import block_linears, pruned_linears, unpruned_linears
from prunus.recovery.scales import dense_size, scales
from prunus.recovery.trainable import Trainable, full, masked

# Up to this many tokens per window, the fused attention of torch is slower on a CPU than two
# batched matrix products.
_MAX_EAGER_TOKENS = 512


def load_student(job: RecoveryJob) -> tuple[Trainable, int]:
    """Load the pruned model into memory, and make it trainable by the mode.

    Returns:
        The trainable model, and its number of parameters before, as a dense one.
    """
    recipe, folder = job.recipe, job.source.checkpoint.folder
    if job.device.type == "cpu":
        # Each step frees and allocates the logits. glibc would give them back to the system.
        keep_freed_memory()
    # In modes lora and scales no matrix is updated, so they need not be float32.
    model = _load(job, folder, job.dtype if recipe.mode in ("lora", "scales") else torch.float32)
    parameters = dense_size(model)
    if recipe.mode == "scales":
        return scales(model, job.dtype), parameters
    if recipe.mode == "lora":
        return lora(model, block_linears(model), recipe, base_name(job.model)), parameters
    # Results are written expert by expert, and zeros are kept in every one of them.
    split_loaded_experts(model)
    if recipe.mode == "full":
        return full(model, unpruned_linears(model, folder)), parameters
    return masked(model, pruned_linears(model, folder)), parameters


def load_teacher(job: RecoveryJob) -> Any:
    """The dense model in memory, or None."""
    if job.teacher is None:
        return None
    teacher = _load(job, job.teacher.checkpoint.folder, job.dtype)
    teacher.requires_grad_(False)
    return teacher


def base_name(model: str | Path) -> str:
    """What an adapter names as its base model.

    This is the absolute path of a folder, which is found from any directory, or a hub id.
    """
    return str(resolve_folder(model).resolve()) if Path(model).is_dir() else str(model)


def _load(job: RecoveryJob, folder: Path, dtype: torch.dtype) -> Any:
    short = job.recipe.seqlen <= _MAX_EAGER_TOKENS
    attention = "eager" if job.device.type == "cpu" and short else None
    return load_model(folder, dtype, attention=attention, mapped=False).to(job.device)
