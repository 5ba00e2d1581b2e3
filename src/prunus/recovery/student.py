"""The two models of a recovery in memory: the one that is trained, and the one that teaches.

Modes masked and full train the parameters that the model has. Mode lora adds an adapter of peft.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from prunus.hardware.machine import keep_freed_memory
from prunus.model.adapter import add_lora
from prunus.model.experts import split_loaded_experts
from prunus.model.linears import JOINED_ATTENTION, Linear
from prunus.model.loading import load_model
from prunus.model.open_folder import OpenFolder
from prunus.pruning.manifest import Manifest
from prunus.recovery.recovery_options import RecoveryOptions
from prunus.recovery.recovery_plan import RecoveryPlan
from prunus.recovery.trainable import (
    MIN_ZERO_FRACTION,
    Trainable,
    block_linears,
    pruned_linears,
    whole_model,
)

# Up to this many tokens per window, the fused attention of torch is slower on a CPU than two
# batched matrix products.
_MAX_EAGER_TOKENS = 512


def load_student(plan: RecoveryPlan) -> tuple[Trainable, int]:
    """Load the checkpoint into memory, and make it trainable by the mode.

    Returns:
        The trainable model, and its number of parameters without those that the mode adds.

    Raises:
        ValueError: The model does not fit the mode: pruned linears in mode full, none in mode
            masked, or bad target modules or rank in mode lora.
    """
    recipe, folder = plan.recipe, plan.source.folder
    if plan.device.type == "cpu":
        # Each step frees and allocates the logits. glibc would give them back to the system.
        keep_freed_memory()
    # In mode lora no stored weight is updated, so they need not be float32.
    model = _load_on_device(plan, folder, plan.dtype if recipe.mode == "lora" else torch.float32)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if recipe.mode == "lora":
        return lora(model, block_linears(model), recipe, base_name(plan.name)), parameters
    # Results are written expert by expert, and zeros are kept in every one of them.
    split_loaded_experts(model)
    linears, pruned = block_linears(model), pruned_linears(model, folder.path)
    if recipe.mode == "full":
        if filled := [name for name in pruned if name in linears]:
            raise ValueError(
                f"{folder.path} has pruned linears ({filled[0]} and others), whose zeros mode full "
                "would fill: choose mode masked, or mode lora if rounding to few bits made the "
                "zeros, and no mask"
            )
        return whole_model(model, linears, {}), parameters
    if not pruned:
        raise ValueError(
            f"{folder.path} has no pruned linears: no {Manifest.FILE} names any, and none has "
            f"{MIN_ZERO_FRACTION:.0%} zeros that are not those of rounding; prune it first (prunus "
            "prune), or choose mode full"
        )
    return whole_model(model, pruned, pruned), parameters


def load_teacher(plan: RecoveryPlan) -> Any:
    """The dense model in memory, without gradients; None if the plan has no teacher."""
    if plan.teacher is None:
        return None
    teacher = _load_on_device(plan, plan.teacher.folder, plan.dtype)
    teacher.requires_grad_(False)
    return teacher


def base_name(model: str | Path) -> str:
    """What an adapter names as its base: a hub id, or a path that holds in any directory."""
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)


def _load_on_device(plan: RecoveryPlan, folder: OpenFolder, dtype: torch.dtype) -> Any:
    """A model in memory on the device of the plan, with the attention that is fastest there."""
    short = plan.recipe.seqlen <= _MAX_EAGER_TOKENS
    attention = "eager" if plan.device.type == "cpu" and short else None
    return load_model(folder, dtype, attention).to(plan.device)


# The targets of the LoRA paper, which the Wanda paper also uses.
_QUERY_AND_VALUE = ("q_proj", "v_proj")


def default_target_modules(names: Iterable[str]) -> tuple[str, ...]:
    """The names of the query and value projections, or of the matrix that holds them.

    Args:
        names: Full names of all linears in the blocks. The result has last parts of such names.

    Raises:
        ValueError: None of the names is one that prunus knows; the message lists them.

    >>> default_target_modules(["h.0.attn.c_attn", "h.0.mlp.c_fc"])
    ('c_attn',)
    """
    last_parts = {name.rpartition(".")[2] for name in names}
    if last_parts.issuperset(_QUERY_AND_VALUE):
        return _QUERY_AND_VALUE
    fused = tuple(name for name in JOINED_ATTENTION if name in last_parts)
    if not fused:
        raise ValueError(
            "the query and value projections of this model have unknown names; choose "
            f"`target_modules` among {', '.join(sorted(last_parts))}"
        )
    return fused


def lora(
    model: Any, linears: Mapping[str, Linear], recipe: RecoveryOptions, base: str
) -> Trainable:
    """Mode lora: low-rank layers beside some linears, as in the Wanda paper; the base stays.

    The layers are those of LoRA (Hu et al., arXiv 2106.09685), and so is the folder of the adapter.

    Args:
        model: A causal LM. It gets the layers, and its own parameters are frozen.
        linears: Full name -> linear, for all linears in its blocks.
        recipe: Rank, alpha, seed and the target modules; None targets the query and value
            projections.
        base: What the adapter names as its base.

    Raises:
        ValueError: A target does not exist, or the rank is too large.
        ModuleNotFoundError: peft is not installed.
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
    model.requires_grad_(False)
    adapted = add_lora(
        model,
        targets,
        rank=recipe.rank,
        alpha=recipe.alpha,
        seed=recipe.seed,
        base=base,
        transposed=any(linear.transposed for linear in selected.values()),
    )
    parameters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    return Trainable(adapted, parameters)
