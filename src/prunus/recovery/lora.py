"""Mode lora: LoRA (Hu et al., arXiv 2106.09685) as the Wanda paper recovers models.

The query and value projections get layers of rank 8. The layers and the folder they are
saved to are those of peft. The base model stays as it is, zeros included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prunus.model.adapter import add_lora
from prunus.model.linears import Linear
from prunus.recovery.options import RecoveryOptions
from prunus.recovery.trainable import Trainable

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
