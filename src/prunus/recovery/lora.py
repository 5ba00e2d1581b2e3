"""LoRA (Hu et al., arXiv 2106.09685) as the Wanda paper recovers models: rank 8 on query and value projections.

The layers and the folder they are saved to are peft's; the base stays as it is, zeros included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunus.model.adapter import add_lora
from prunus.model.linears import Linear
from prunus.recovery.sparse_lora import check_rank
from prunus.recovery.trainable import Trainable

__all__ = ["choose", "default_targets", "lora"]

_QUERY_AND_VALUE = ("q_proj", "v_proj")
#: Names under which families store query, key and value in one matrix.
_FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")


def default_targets(linears: Mapping[str, Linear]) -> tuple[str, ...]:
    """Last parts of the names of the query and value projections, or of the matrix that holds them.

    Raises:
        ValueError: none of the names is known; lists those there are.
    """
    last = {name.rpartition(".")[2] for name in linears}
    if last.issuperset(_QUERY_AND_VALUE):
        return _QUERY_AND_VALUE
    fused = tuple(name for name in _FUSED if name in last)
    if not fused:
        raise ValueError(
            f"this model names its query and value projections otherwise; choose with --targets among {_listed(last)}"
        )
    return fused


def choose(linears: Mapping[str, Linear], targets: tuple[str, ...]) -> dict[str, Linear]:
    """The linears whose names end in one of `targets`.

    Raises:
        ValueError: one of them names none.
    """
    last = {name.rpartition(".")[2] for name in linears}
    for target in targets:
        if target not in last:
            raise ValueError(
                f"--targets {target!r} names none of the linears; their names are {_listed(last)}"
            )
    return {name: linear for name, linear in linears.items() if name.rpartition(".")[2] in targets}


def lora(
    model: Any,
    linears: Mapping[str, Linear],
    targets: tuple[str, ...] | None,
    rank: int,
    alpha: float,
    seed: int,
    base: str,
) -> Trainable:
    """Give linears fresh LoRA layers; `Trainable.model` is then a peft model.

    Args:
        model: a causal LM.
        linears: all linears of its blocks by full name.
        targets: last parts of names; None for query and value projections.
        rank, alpha, seed, base: see `add_lora`.

    Raises:
        ValueError: a target that is not there, a rank that is too large, linears of two orientations.
        ModuleNotFoundError: peft is not installed; names the extra.
    """
    targets = targets or default_targets(linears)
    chosen = choose(linears, targets)
    for name, linear in chosen.items():
        check_rank(rank, name, linear)
    orientations = {linear.transposed for linear in chosen.values()}
    if len(orientations) > 1:
        raise ValueError(
            f"--targets {','.join(targets)} mixes linears that are stored transposed with others"
        )
    model.requires_grad_(False)
    adapted = add_lora(
        model, targets, rank=rank, alpha=alpha, seed=seed, base=base, transposed=orientations.pop()
    )
    parameters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    return Trainable(adapted, parameters, added=sum(p.numel() for p in parameters.values()))


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
