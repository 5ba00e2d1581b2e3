"""The two models of a recovery in memory: the one that is trained, and the one that teaches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from prunus.hardware.memory import keep_freed_memory
from prunus.model.adapter import add_lora
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.experts import split_loaded_experts
from prunus.model.linears import Linear
from prunus.model.loading import load_model
from prunus.recovery.job import RecoveryJob
from prunus.recovery.options import RecoveryOptions
from prunus.recovery.scales import dense_size, scales
from prunus.recovery.trainable import (
    Trainable,
    block_linears,
    full,
    masked,
    pruned_linears,
    unpruned_linears,
)

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


_QUERY_AND_VALUE = ("q_proj", "v_proj")
#: Names under which some families store query, key and value in one matrix.
_FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")


def default_target_modules(names: Iterable[str]) -> tuple[str, ...]:
    """The names of the query and value projections, or of the matrix that holds them.

    >>> default_target_modules(["h.0.attn.c_attn", "h.0.mlp.c_fc"])
    ('c_attn',)
    """
    known = {name.rpartition(".")[2] for name in names}
    if known.issuperset(_QUERY_AND_VALUE):
        return _QUERY_AND_VALUE
    fused = tuple(name for name in _FUSED if name in known)
    if not fused:
        raise ValueError(
            "the query and value projections of this model have unknown names; choose "
            f"`target_modules` among {', '.join(sorted(known))}"
        )
    return fused


def lora(
    model: Any, linears: Mapping[str, Linear], recipe: RecoveryOptions, base: str
) -> Trainable:
    """Add fresh LoRA layers to linears; `Trainable.model` is then a peft model.

    Args:
        recipe: Rank, scale, seed, and the last parts of the names of the linears to extend.
    """
    targets = recipe.target_modules or default_target_modules(linears)
    last_parts = {name: name.rpartition(".")[2] for name in linears}
    for target in targets:
        if target not in last_parts.values():
            raise ValueError(
                f"target_modules {target!r} names none of the linears; their names are "
                f"{', '.join(sorted(set(last_parts.values())))}"
            )
    selected = {name: x for name, x in linears.items() if last_parts[name] in targets}
    for name, linear in selected.items():
        if recipe.rank > min(linear.shape):
            raise ValueError(
                f"rank {recipe.rank} is more than {name} of shape {linear.shape} can have: "
                f"lower `rank` to {min(linear.shape)} or less"
            )
    orientations = {linear.transposed for linear in selected.values()}
    if len(orientations) > 1:
        raise ValueError(
            f"target_modules {','.join(targets)} mixes linears that store their weight "
            "transposed with others; train them in two runs"
        )
    model.requires_grad_(False)
    adapted = add_lora(
        model,
        targets,
        rank=recipe.rank,
        alpha=recipe.alpha,
        seed=recipe.seed,
        base=base,
        transposed=orientations.pop(),
    )
    parameters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    return Trainable(adapted, parameters, added=sum(p.numel() for p in parameters.values()))
