"""The two models of a recovery in memory: the one that is trained, and the one that teaches.

Modes masked and full train the parameters that the model has. Mode lora adds an adapter of peft.
Mode scales puts modules in place of the quantised linears, whose scales and steps are parameters.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from prunus.hardware.memory import keep_freed_memory
from prunus.model.adapter import add_lora
from prunus.model.checkpoint.resolve import resolve_folder
from prunus.model.experts import split_loaded_experts
from prunus.model.linears import Linear
from prunus.model.loading import load_model
from prunus.recovery.job import RecoveryJob
from prunus.recovery.options import RecoveryOptions
from prunus.recovery.trainable import (
    Trainable,
    block_linears,
    pruned_linears,
    unpruned_linears,
    whole_model,
)
from prunus.runtime.linear import (
    DenseLinear,
    PackedEmbedding,
    PackedLinear,
    plain_linear,
    unpack_module,
)
from prunus.runtime.planes import decode_levels
from prunus.runtime.weight import QuantizedWeight

# Up to this many tokens per window, the fused attention of torch is slower on a CPU than two
# batched matrix products.
_MAX_EAGER_TOKENS = 512


def load_student(job: RecoveryJob) -> tuple[Trainable, int]:
    """Load the checkpoint into memory, and make it trainable by the mode.

    Returns:
        The trainable model, and its number of parameters as a dense model.

    Raises:
        ValueError: The model does not fit the mode: pruned linears in mode full, none in mode
            masked, or bad target modules or rank in mode lora.
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
        return whole_model(model, unpruned_linears(model, folder), {}), parameters
    pruned = pruned_linears(model, folder)
    return whole_model(model, pruned, pruned), parameters


def load_teacher(job: RecoveryJob) -> Any:
    """The dense model in memory, without gradients; None if the job has no teacher."""
    if job.teacher is None:
        return None
    teacher = _load(job, job.teacher.checkpoint.folder, job.dtype)
    teacher.requires_grad_(False)
    return teacher


def base_name(model: str | Path) -> str:
    """What an adapter names as its base: a hub id, or a path that holds in any directory."""
    return str(resolve_folder(model).resolve()) if Path(model).is_dir() else str(model)


def _load(job: RecoveryJob, folder: Path, dtype: torch.dtype) -> Any:
    """A model in memory on the device of the job, with the attention that is fastest there."""
    short = job.recipe.seqlen <= _MAX_EAGER_TOKENS
    attention = "eager" if job.device.type == "cpu" and short else None
    return load_model(folder, dtype, attention=attention).to(job.device)


# The targets of the LoRA paper, which the Wanda paper also uses.
_QUERY_AND_VALUE = ("q_proj", "v_proj")
#: Names under which some families store query, key and value in one matrix.
_FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")


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
    fused = tuple(name for name in _FUSED if name in last_parts)
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
        ValueError: A target does not exist, the rank is too large, or some targets store their
            weight transposed and others do not.
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


class ScaledLinear(nn.Module):
    """A quantised linear in training: its integers are fixed, its scales and steps are trained.

    The forward pass uses scales and steps as they would be stored, rounded to bfloat16. So the
    held-out loss is that of the result. The gradient passes through the rounding unchanged.
    bfloat16 holds the integers exactly.

    Args:
        linear: The quantised linear of the model, whose bias is shared.
        dtype: The dtype of the matrix product.
    """

    #: The integers, in the dtype of the product.
    levels_OI: torch.Tensor
    #: The stored scale of each row, float32.
    scales_O: torch.Tensor
    #: The stored step of each column, float32.
    steps_I: torch.Tensor

    def __init__(self, linear: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        packed = linear.packed
        assert isinstance(packed, QuantizedWeight)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("levels_OI", decode_levels(packed).to(dtype))
        self.register_buffer("scales_O", packed.scales.float())
        self.register_buffer("steps_I", packed.steps.float())
        # α (O,) and β (I,) of `scales`, which are trained.
        self.log_scales = nn.Parameter(torch.zeros_like(self.scales_O))
        self.log_steps = nn.Parameter(torch.zeros_like(self.steps_I))
        self.bias = linear.bias

    def scales(self) -> torch.Tensor:
        """The current scales (O,), rounded to bfloat16, in float32."""
        return _rounded(self.scales_O * self.log_scales.exp())

    def steps(self) -> torch.Tensor:
        """The current steps (I,), rounded to bfloat16, in float32."""
        return _rounded(self.steps_I * self.log_steps.exp())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., I) to (..., O) in the dtype of the integers."""
        dtype = self.levels_OI.dtype
        with torch.autocast(x.device.type, enabled=False):
            scaled = x.to(dtype) * self.steps().to(dtype)
            y = functional.linear(scaled, self.levels_OI) * self.scales().to(dtype)
            return y if self.bias is None else y + self.bias.to(dtype)


def scales(model: Any, dtype: torch.dtype) -> Trainable:
    """Mode scales: train everything continuous in a compressed model; its integers stay.

        W_ij = scale_i · exp(α_i) · step_j · exp(β_j) · level_ij

    The logarithms α (O,) and β (I,) begin at 0, so all share one learning rate, whatever the size
    of the weights. Norm weights and biases are trained as they are, with rates relative to their
    root mean squares. AQLM (arXiv 2401.06118) and QuIP# (arXiv 2402.04396) also train the
    continuous parameters of a quantised model towards its dense model.

    A quantised embedding stays as it is, and so does the head that is tied to it. A weight that is
    packed but not trained is expanded, so that a step does not decode it again.

    Args:
        model: A compressed causal LM in memory. Its linears are replaced.
        dtype: The dtype of matrix products.
    """
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedEmbedding):
            unpack_module(model, name, dtype)
        elif isinstance(module, PackedLinear) and module.layout is not None:
            model.set_submodule(name, ScaledLinear(module, dtype))
        elif isinstance(module, PackedLinear):
            model.set_submodule(name, plain_linear(module.dense(dtype), module.bias))
        elif isinstance(module, DenseLinear):
            # The kernel of a `DenseLinear` does not know autocast.
            model.set_submodule(name, plain_linear(module.weight, module.bias))
    parameters, rates = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms, biases, α and β; every matrix stays
            parameter.data = parameter.data.float()
            parameters[name] = parameter.requires_grad_(True)
            if not name.endswith((".log_scales", ".log_steps")):
                rates[name] = float(parameter.detach().square().mean().sqrt())
    return Trainable(model, parameters, rates=rates)


def trained_tensors(trainable: Trainable) -> dict[str, torch.Tensor]:
    """Name in the model -> what a packed checkpoint stores there, after mode scales."""
    tensors = {
        name: parameter.detach()
        for name, parameter in trainable.parameters.items()
        if not name.endswith((".log_scales", ".log_steps"))
    }
    with torch.no_grad():
        for name, module in trainable.model.named_modules():
            if isinstance(module, ScaledLinear):
                tensors[f"{name}.weight_scales"] = module.scales()
                tensors[f"{name}.weight_steps"] = module.steps()
    return tensors


def dense_size(model: nn.Module) -> int:
    """The number of parameters that a packed model would have as a dense one."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    inside = sum(module.in_features * module.out_features for module in packed)
    return inside + sum(parameter.numel() for parameter in model.parameters())


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Round to bfloat16 (x + (rounded − x) is exact in float32); the gradient passes unchanged."""
    exact = x.detach()
    return x + (exact.bfloat16().float() - exact)
