"""Mode lora: LoRA (Hu et al., arXiv 2106.09685) as the Wanda paper recovers models.

The query and value projections get layers of rank 8. The layers and the folder they are
saved to are those of peft. The base model stays as it is, zeros included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunus.model.adapter import add_lora
from prunus.model.linears import Linear
from prunus.recovery.trainable import Trainable

__all__ = ["default_target_modules", "lora"]

_QUERY_AND_VALUE = ("q_proj", "v_proj")
#: Names under which some families store query, key and value in one matrix.
_FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")


def default_target_modules(linears: Mapping[str, Linear]) -> tuple[str, ...]:
    """Return the names of the query and value projections, or of the matrix that holds them.

    Args:
        linears: full name -> linear. The result holds last parts of such names.

    Raises:
        ValueError: none of the names is known; the message lists the names there are.

    Example:
        >>> default_target_modules({"h.0.attn.c_attn": None, "h.0.mlp.c_fc": None})
        ('c_attn',)
    """
    known = {name.rpartition(".")[2] for name in linears}
    if known.issuperset(_QUERY_AND_VALUE):
        return _QUERY_AND_VALUE
    fused = tuple(name for name in _FUSED if name in known)
    if not fused:
        raise ValueError(
            "the query and value projections of this model have unknown names; choose with "
            f"target_modules among {_listed(known)}"
        )
    return fused


def _select_linears(
    linears: Mapping[str, Linear], target_modules: tuple[str, ...]
) -> dict[str, Linear]:
    """Return the linears whose names end in one of `target_modules`.

    Raises:
        ValueError: one of `target_modules` is the name of no linear.
    """
    known = {name.rpartition(".")[2] for name in linears}
    for target in target_modules:
        if target not in known:
            raise ValueError(
                f"target_modules {target!r} names none of the linears; their names are "
                f"{_listed(known)}"
            )
    return {
        name: linear
        for name, linear in linears.items()
        if name.rpartition(".")[2] in target_modules
    }


def lora(
    model: Any,
    linears: Mapping[str, Linear],
    target_modules: tuple[str, ...] | None,
    rank: int,
    alpha: float,
    seed: int,
    base: str,
) -> Trainable:
    """Add fresh LoRA layers to linears; `Trainable.model` is then a peft model.

    Args:
        model: a causal LM.
        linears: all linears of its blocks by full name.
        target_modules: last parts of the names of the linears that get a layer; None for the query
            and value projections.
        rank, alpha, seed, base: see `add_lora`.

    Raises:
        ValueError: a target does not exist, the rank is too large, or some linears store their
            weight transposed and others do not.
        ModuleNotFoundError: peft is not installed; the message names the extra.
    """
    target_modules = target_modules or default_target_modules(linears)
    selected = _select_linears(linears, target_modules)
    for name, linear in selected.items():
        if rank > min(linear.shape):
            raise ValueError(
                f"rank {rank} is more than {name} of shape {linear.shape} can have: "
                f"give {min(linear.shape)} or less"
            )
    orientations = {linear.transposed for linear in selected.values()}
    if len(orientations) > 1:
        raise ValueError(
            f"target_modules {','.join(target_modules)} mixes linears that store their weight "
            "transposed with others; train them in two runs"
        )
    model.requires_grad_(False)
    adapted = add_lora(
        model,
        target_modules,
        rank=rank,
        alpha=alpha,
        seed=seed,
        base=base,
        transposed=orientations.pop(),
    )
    parameters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    return Trainable(adapted, parameters, added=sum(p.numel() for p in parameters.values()))


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
