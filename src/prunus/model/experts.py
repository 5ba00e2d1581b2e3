"""Experts that transformers fuses into three-dimensional parameters, taken apart into one linear per matrix.

transformers 5 holds the experts of a layer in one module with `gate_up_proj` (experts, out, in) and `down_proj`, and
says in attributes how they are laid out (`is_transposed`, `is_concatenated`, `has_bias`, `has_gate`) and in
`_apply_gate` what lies between them. `take_apart` replaces such a module by an `Experts` of the same arithmetic whose
matrices are `nn.Linear` modules under the names that the checkpoint gives them, so that everything else sees linears.
`Fused` is the way back: which piece of which fused tensor each linear is.

Shape suffixes: E experts, T tokens, K experts per token, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Experts",
    "Fused",
    "find_routers",
    "fused_experts",
    "fusing_rules",
    "is_fusing",
    "take_apart",
]

#: Gate, up and down where the checkpoint holds fused tensors and so has no names of its own.
_LEAVES = ("gate_proj", "up_proj", "down_proj")
#: How transformers makes a fused parameter of experts stored one by one; anything else is not taken apart.
_FUSING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


@dataclass(frozen=True)
class Fused:
    """One fused tensor of a block.

    Attributes:
        name: relative to the block, e.g. `mlp.experts.gate_up_proj`.
        shape: as the model has it.
        leaves: what one expert's slice holds, by name relative to the block's `experts` module: `{}` stands for the
            expert's number, e.g. ("{}.gate_proj.weight", "{}.up_proj.weight").
        transposed: a slice is (in, out).
        concatenated: the leaves follow each other in a slice; otherwise their rows alternate.
    """

    name: str
    shape: tuple[int, ...]
    leaves: tuple[str, ...]
    transposed: bool
    concatenated: bool

    @property
    def members(self) -> list[str]:
        """Names relative to the block of the tensors it is made of."""
        path = self.name.rpartition(".")[0]
        return [f"{path}.{leaf.format(e)}" for e in range(self.shape[0]) for leaf in self.leaves]

    def cut(self, tensor: Tensor) -> dict[str, Tensor]:
        """Views of the fused `tensor` (E, …) by relative name: weights (out, in), biases (out,)."""
        pieces = []
        for slice_ in tensor:
            rows = slice_.T if self.transposed and slice_.dim() == 2 else slice_
            step = len(rows) // len(self.leaves)
            for place in range(len(self.leaves)):
                by_part = rows[place * step : (place + 1) * step]
                pieces.append(by_part if self.concatenated else rows[place :: len(self.leaves)])
        return dict(zip(self.members, pieces, strict=True))

    def join(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """The fused tensor of its pieces (all `members`), in their dtype and on their device."""
        first = pieces[self.members[0]]
        fused = first.new_empty(self.shape)
        for name, view in self.cut(fused).items():
            view.copy_(pieces[name])
        return fused


class Experts(nn.Module):
    """The experts of a layer, each with linears of its own. Made by `take_apart`; takes the fused module's arguments.

    Experts run in the order of their numbers, each on the tokens that chose it, in the order of the text.

    Attributes:
        measured_on_all: experts whose linears are called with all tokens, so that whoever watches them sees these; what
            the module returns is not touched by it.
    """

    measured_on_all: frozenset[int]

    def __init__(self, fused: nn.Module, leaves: tuple[str, str, str], dtype: torch.dtype) -> None:
        super().__init__()
        gated, biased = _is_gated(fused), bool(fused.has_bias)
        first: Any = fused.gate_up_proj if gated else fused.up_proj
        self.count, rows, columns = first.shape
        if fused.is_transposed:
            rows, columns = columns, rows
        width = rows // 2 if gated else rows
        self.leaves = leaves
        self.gated = gated
        shapes = {leaves[0]: (columns, width)} if gated else {}
        shapes |= {leaves[1]: (columns, width), leaves[2]: (width, columns)}
        for number in range(self.count):
            expert = nn.Module()
            for leaf, (inputs, outputs) in shapes.items():
                expert.add_module(
                    leaf, nn.Linear(inputs, outputs, bias=biased, device="meta", dtype=dtype)
                )
            self.add_module(str(number), expert)
        self.post_expert_norm: nn.Module | None = None
        if getattr(fused, "has_post_expert_norm", False):
            self.post_expert_norm = fused.get_submodule("post_expert_norm")
        self._concatenated = bool(fused.is_concatenated)
        self._names = list(inspect.signature(type(fused).forward).parameters)[1:4]
        # Kept for its activation and gate, out of sight of whoever looks for modules; its parameters are gone.
        fused._parameters.clear()
        self._fused = (fused,)
        self.measured_on_all = frozenset()

    def arguments(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of one call: hidden states (T, H), the experts that each token chose (T, K), and their shares (T, K)."""
        given = dict(zip(self._names, args, strict=False)) | dict(kwargs)
        X_TH, chosen_TK, share_TK = (given[name] for name in self._names)
        return X_TH, chosen_TK, share_TK

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the experts make of each token, added up by its shares; (T, H)."""
        X_TH, chosen_TK, share_TK = self.arguments(args, kwargs)
        out_TH = torch.zeros_like(X_TH)
        chosen = set(chosen_TK.unique().tolist()) & set(range(self.count))
        for number in sorted(chosen | self.measured_on_all):
            expert = self._modules[str(number)]
            assert expert is not None
            watched = number not in self.measured_on_all
            if not watched:
                self._run(expert, X_TH, _call)
            token, slot = torch.where(chosen_TK == number)
            if len(token):
                # Past the hooks where all tokens were seen already: the same arithmetic as without them.
                made = self._run(expert, X_TH[token], _call if watched else _call_unseen)
                weighted = made * share_TK[token, slot, None]
                out_TH.index_add_(0, token, weighted.to(out_TH.dtype))
        return out_TH

    def _run(
        self, expert: nn.Module, X_TH: Tensor, call: Callable[[Any, Tensor], Tensor]
    ) -> Tensor:
        fused: Any = self._fused[0]
        gate, up, down = self.leaves
        inner = call(expert.get_submodule(up), X_TH) if not self.gated else None
        if inner is None:
            both = (call(expert.get_submodule(gate), X_TH), call(expert.get_submodule(up), X_TH))
            joined = (
                torch.cat(both, dim=-1)
                if self._concatenated
                else torch.stack(both, dim=-1).flatten(-2)
            )
            inner = fused._apply_gate(joined)
        else:
            inner = fused.act_fn(inner)
        out: Tensor = call(expert.get_submodule(down), inner)
        return out if self.post_expert_norm is None else self.post_expert_norm(out)


def _call(linear: nn.Module, x: Tensor) -> Tensor:
    return linear(x)


def _call_unseen(linear: nn.Module, x: Tensor) -> Tensor:
    """As `_call`, without the hooks."""
    return linear.forward(x)


def fusing_rules(model: Any) -> list[Any]:
    """Those of transformers' rules by which experts that a checkpoint stores one by one are fused for this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return [rule for rule in get_model_conversion_mapping(model) if is_fusing(rule)]


def is_fusing(rule: Any) -> bool:
    """Whether one of transformers' rules for the names of weights fuses experts."""
    from transformers.core_model_loading import WeightConverter

    return (
        isinstance(rule, WeightConverter)
        and [type(operation).__name__ for operation in rule.operations] in _FUSING
    )


def take_apart(rules: Sequence[Any], block: nn.Module, path: str) -> list[Fused]:
    """Replace every fused experts module of a block, on the meta device, by an `Experts`.

    Args:
        rules: the model's `fusing_rules`, which know the checkpoint's names.
        block: one of its blocks, or the model.
        path: of the block in the model, or "".

    Returns:
        The tensors that the block no longer has, in the order of registration.
    """
    found: list[Fused] = []
    for name, module in list(block.named_modules()):
        if not _is_fused(module):
            continue
        leaves = _leaves(rules, f"{path}.{name}".lstrip("."), _is_gated(module))
        found += _layout(name, module, leaves)
        owner, _, leaf = name.rpartition(".")
        dtype = next(module.parameters(recurse=False)).dtype
        experts = Experts(module, leaves, dtype).eval().requires_grad_(False)
        setattr(block.get_submodule(owner), leaf, experts)
    return found


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the modules of a loaded model that hold fused experts."""
    return [name for name, module in model.named_modules() if _is_fused(module)]


def _is_gated(module: Any) -> bool:
    return "gate_up_proj" in module._parameters


def _is_fused(module: Any) -> bool:
    """Whether this is an experts module as `transformers.integrations.moe` describes them, with nothing else in it."""
    declared = ("is_transposed", "is_concatenated", "has_bias", "has_gate", "_apply_gate")
    if not all(hasattr(module, name) for name in declared):
        return False
    first = "gate_up_proj" if module.has_gate else "up_proj"
    wanted = {first, "down_proj"} | (
        {f"{first}_bias", "down_proj_bias"} if module.has_bias else set()
    )
    parameters = dict(module._parameters)
    takes = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    return (
        set(parameters) == wanted
        and all(
            p is not None and p.dim() == (2 if n.endswith("_bias") else 3)
            for n, p in parameters.items()
        )
        and len(takes) == 3
    )


def _layout(path: str, module: Any, leaves: tuple[str, str, str]) -> list[Fused]:
    gate, up, down = leaves
    found = []
    for name, parameter in module.named_parameters(recurse=False):
        kind = "bias" if name.endswith("_bias") else "weight"
        parts = (
            (down,)
            if name.startswith("down")
            else (gate, up)
            if name.startswith("gate_up")
            else (up,)
        )
        found.append(
            Fused(
                name=f"{path}.{name}",
                shape=tuple(parameter.shape),
                leaves=tuple(f"{{}}.{part}.{kind}" for part in parts),
                transposed=bool(module.is_transposed),
                concatenated=bool(module.is_concatenated),
            )
        )
    return found


def _leaves(rules: Sequence[Any], path: str, gated: bool) -> tuple[str, str, str]:
    """What the checkpoint calls gate, up and down of one expert, such as w1, w3, w2."""
    found = dict(zip(("gate", "up", "down"), _LEAVES, strict=True))
    for rule in rules:
        for place, pattern in enumerate(rule.source_patterns):
            leaf = pattern.rpartition("*.")[2].removesuffix(".weight")
            target, matched = rule.rename_source_key(f"{path}.0.{leaf}.weight")
            if matched != pattern or not leaf.isidentifier():
                continue
            if target == f"{path}.down_proj":
                found["down"] = leaf
            elif gated and target == f"{path}.gate_up_proj" and place < 2:
                found["gate" if place == 0 else "up"] = leaf
            elif not gated and target == f"{path}.up_proj":
                found["up"] = leaf
    return found["gate"], found["up"], found["down"]


def find_routers(block: nn.Module) -> set[str]:
    """Relative names of linears that choose among experts or weigh them: beside `experts`, one output each or one.

    What lies beside experts and gives as many features as it takes, such as attention or a shared expert, passes hidden
    states on and chooses nothing, whatever the widths inside.
    """
    routers = set()
    for path, module in block.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, Experts | nn.ModuleList):
            continue
        count = experts.count if isinstance(experts, Experts) else len(experts)
        for name, beside in module.named_children():
            inside = [(n, x) for n, x in beside.named_modules() if isinstance(x, nn.Linear)]
            if beside is experts or (
                len(inside) > 1 and inside[0][1].in_features == inside[-1][1].out_features
            ):
                continue
            for inner, linear in inside:
                if linear.out_features in (1, count):
                    routers.add(".".join(filter(None, (path, name, inner))))
    return routers
