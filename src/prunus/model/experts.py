"""Fused experts, split into one linear per matrix.

A mixture of experts has, in place of one MLP per block, several (the experts), and a router that
chooses a few of them for each token. transformers 5 holds the experts of a block in one module,
with fused parameters: `gate_up_proj` (experts, out, in) and `down_proj`. Attributes of that module
say how they are laid out (`is_transposed`, `is_concatenated`, `has_bias`, `has_gate`), and its
method `_apply_gate` computes what lies between the two.

Methods prune linears. So `unfuse_experts` replaces such a module by an `Experts` module with the
same arithmetic, whose matrices are `nn.Linear` modules, under the names that checkpoints give them.
All other code then sees linears only. `Fused` is the way back: it says which piece of which fused
tensor each linear is.

Shape suffixes: E experts, T tokens, K experts per token, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Names of gate, up and down if the checkpoint stores fused tensors and so has no names for them.
_LEAVES = ("gate_proj", "up_proj", "down_proj")
#: How transformers fuses experts that are stored one by one. Other conversions are not undone here.
_FUSING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


@dataclass(frozen=True)
class Fused:
    """One fused tensor of a block, and how the tensors of single experts lie in it.

    Attributes:
        name: Name relative to the block, e.g. `mlp.experts.gate_up_proj`.
        shape: Shape in the model, (experts, …): three axes for a weight, two for a bias.
        leaves: What the slice of one expert holds, by name relative to the block's `experts`
            module. `{}` stands for the number of the expert, e.g. ("{}.gate_proj.weight",
            "{}.up_proj.weight").
        transposed: Whether a slice is (in, out).
        concatenated: Whether the leaves follow each other in a slice; if not, their rows alternate.

    >>> fused = Fused("experts.up", (2, 2, 1), ("{}.up.weight",), False, True)
    >>> fused.members
    ['experts.0.up.weight', 'experts.1.up.weight']
    >>> tensor = torch.arange(4.0).view(2, 2, 1)
    >>> fused.cut(tensor)["experts.1.up.weight"].tolist()
    [[2.0], [3.0]]
    >>> torch.equal(fused.join(fused.cut(tensor)), tensor)
    True
    """

    name: str
    shape: tuple[int, ...]
    leaves: tuple[str, ...]
    transposed: bool
    concatenated: bool

    @property
    def members(self) -> list[str]:
        """Names relative to the block of the tensors that it consists of, expert by expert."""
        path = self.name.rpartition(".")[0]
        return [f"{path}.{leaf.format(e)}" for e in range(self.shape[0]) for leaf in self.leaves]

    def cut(self, tensor: Tensor) -> dict[str, Tensor]:
        """Views of the fused `tensor` (E, …) by relative name: weights (out, in), biases (out,)."""
        pieces = []
        for slice_ in tensor:
            rows = slice_.T if self.transposed and slice_.dim() == 2 else slice_
            step = len(rows) // len(self.leaves)
            for leaf in range(len(self.leaves)):
                in_one_run = rows[leaf * step : (leaf + 1) * step]
                pieces.append(in_one_run if self.concatenated else rows[leaf :: len(self.leaves)])
        return dict(zip(self.members, pieces, strict=True))

    def join(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """The fused tensor of its pieces (all `members`), in their dtype and on their device."""
        first = pieces[self.members[0]]
        fused = first.new_empty(self.shape)
        for name, view in self.cut(fused).items():
            view.copy_(pieces[name])
        return fused


class Experts(nn.Module):
    """The experts of a block, each with linears of its own. Made by `unfuse_experts`.

    Experts run in the order of their numbers, each on the tokens that chose it, in text order. The
    order is fixed so that the result does not depend on how tokens are grouped.

    Args:
        fused: The module that this one replaces. It loses its parameters, but still computes
            activation and gate.
        leaves: Names of gate, up and down of one expert. Experts without a gate have no linear of
            the first name.
        dtype: Dtype of the linears, which are on the meta device.

    Attributes:
        count: Number of experts.
        leaves: As given.
        gated: Whether experts have a gate.
        measured_on_all: Experts whose linears also run on all tokens, so that hooks on them see all
            tokens. An expert that few tokens chose gets usable statistics in this way. What the
            module returns does not change.
        on_output: Called with the number of an expert, its outputs (T, H) before the router's
            weights, and these weights (T,); None to call nothing.
        post_expert_norm: The norm of the fused module after each expert; None without one.
    """

    def __init__(self, fused: nn.Module, leaves: tuple[str, str, str], dtype: torch.dtype) -> None:
        super().__init__()
        gated = bool(fused.has_gate)
        biased = bool(fused.has_bias)
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
        # The fused module computes activation and gate; its parameters are not needed. In a tuple,
        # nn.Module does not register it, and searches for modules do not find it.
        for name, _ in list(fused.named_parameters(recurse=False)):
            delattr(fused, name)
        self._fused = (fused,)
        self.measured_on_all: frozenset[int] = frozenset()
        self.on_output: Callable[[int, Tensor, Tensor], object] | None = None

    def arguments(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of one call, by position, whatever the family calls them.

        Returns:
            Hidden states (T, H); the numbers of the experts that each token chose (T, K); their
            weights (T, K).
        """
        by_name = dict(zip(self._names, args, strict=False)) | dict(kwargs)
        X_TH, chosen_TK, weight_TK = (by_name[name] for name in self._names)
        return X_TH, chosen_TK, weight_TK

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sum of what its experts return for each token, (T, H); see `arguments`."""
        X_TH, chosen_TK, weight_TK = self.arguments(args, kwargs)
        out_TH = torch.zeros_like(X_TH)
        chosen = set(chosen_TK.unique().tolist()) & set(range(self.count))
        for number in sorted(chosen | self.measured_on_all):
            on_all = number in self.measured_on_all
            if on_all:
                self._run(number, X_TH)  # for the hooks; the output is not used
            token, slot = torch.where(chosen_TK == number)
            if len(token):
                # Hooks have seen all tokens already, and must not see these a second time.
                output = self._run(number, X_TH[token], hooks=not on_all)
                if self.on_output is not None:
                    self.on_output(number, output, weight_TK[token, slot])
                weighted = output * weight_TK[token, slot, None]
                out_TH.index_add_(0, token, weighted.to(out_TH.dtype))
        return out_TH

    def _run(self, number: int, X_TH: Tensor, hooks: bool = True) -> Tensor:
        """The output (T, H) of one expert for tokens (T, H).

        Without `hooks`, the linears run as usual, but nobody who observes them is called.
        """
        fused: Any = self._fused[0]
        gate, up, down = self.leaves

        def call(leaf: str, x: Tensor) -> Tensor:
            linear: Any = self.get_submodule(f"{number}.{leaf}")
            result: Tensor = linear(x) if hooks else linear.forward(x)
            return result

        if self.gated:
            both = (call(gate, X_TH), call(up, X_TH))
            # `_apply_gate` expects the two as the fused product has them: one after the other, or
            # in alternating columns.
            if self._concatenated:
                joined = torch.cat(both, dim=-1)
            else:
                joined = torch.stack(both, dim=-1).flatten(-2)
            inner = fused._apply_gate(joined)
        else:
            inner = fused.act_fn(call(up, X_TH))
        out = call(down, inner)
        return out if self.post_expert_norm is None else self.post_expert_norm(out)


# --- from fused to single experts ---


def fusing_rules(model: Any) -> list[Any]:
    """The rules of transformers that fuse single experts of a checkpoint when it is loaded.

    They know the names that checkpoints of this model give to single experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return [
        rule
        for rule in get_model_conversion_mapping(model)
        if isinstance(rule, WeightConverter)
        and [type(operation).__name__ for operation in rule.operations] in _FUSING
    ]


def unfuse_experts(rules: Sequence[Any], block: nn.Module, path: str) -> list[Fused]:
    """Replace every module of fused experts in a block by an `Experts` on the meta device.

    Args:
        rules: What `fusing_rules` returns for the model.
        block: One of its blocks, or the whole model.
        path: Name of the block in the model; "" for the whole model.

    Returns:
        The tensors that the block no longer has, in the order in which they were registered.
    """
    replaced: list[Fused] = []
    for name, module in list(block.named_modules()):
        if not _is_fused(module):
            continue
        leaves = _leaves(rules, f"{path}.{name}".lstrip("."), bool(module.has_gate))
        replaced += _layout(name, module, leaves)
        owner, _, leaf = name.rpartition(".")
        dtype = next(module.parameters(recurse=False)).dtype
        experts = Experts(module, leaves, dtype).eval().requires_grad_(False)
        setattr(block.get_submodule(owner), leaf, experts)
    return replaced


def split_loaded_experts(model: nn.Module) -> None:
    """Replace the fused experts of a loaded model by single ones with the same weights, in place.

    Each tensor is copied, so both forms of one module are in memory for a moment.
    """
    names = find_fused_experts(model)
    if not names:
        return
    values = {
        f"{name}.{key}": parameter.detach()
        for name in names
        for key, parameter in model.get_submodule(name).named_parameters(recurse=False)
    }
    training = model.training
    for fused in unfuse_experts(fusing_rules(model), model, ""):
        for member, piece in fused.cut(values.pop(fused.name)).items():
            owner, _, leaf = member.rpartition(".")
            setattr(
                model.get_submodule(owner), leaf, nn.Parameter(piece.clone(), requires_grad=False)
            )
    model.train(training)


def find_fused_experts(model: nn.Module) -> list[str]:
    """Names of the modules of a model that hold fused experts."""
    return [name for name, module in model.named_modules() if _is_fused(module)]


def _is_fused(module: Any) -> bool:
    """Whether this is a module of experts as `transformers.integrations.moe` declares them."""
    # The arithmetic of a module with other parameters, or another call, is unknown here.
    declared = ("is_transposed", "is_concatenated", "has_bias", "has_gate", "_apply_gate")
    if not all(hasattr(module, name) for name in declared):
        return False
    first = "gate_up_proj" if module.has_gate else "up_proj"
    # Name of a parameter -> how many axes it has.
    expected = {first: 3, "down_proj": 3}
    if module.has_bias:
        expected |= {f"{first}_bias": 2, "down_proj_bias": 2}
    axes = {name: x.dim() for name, x in module.named_parameters(recurse=False)}
    takes = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    return axes == expected and len(takes) == 3


def _layout(path: str, module: Any, leaves: tuple[str, str, str]) -> list[Fused]:
    """How each parameter of a fused module is made of the linears of its experts."""
    gate, up, down = leaves
    parts = {"gate_up_proj": (gate, up), "up_proj": (up,), "down_proj": (down,)}
    form = bool(module.is_transposed), bool(module.is_concatenated)
    fused = []
    for name, parameter in module.named_parameters(recurse=False):
        kind = "bias" if name.endswith("_bias") else "weight"
        inside = tuple(f"{{}}.{part}.{kind}" for part in parts[name.removesuffix("_bias")])
        fused.append(Fused(f"{path}.{name}", tuple(parameter.shape), inside, *form))
    return fused


def _leaves(rules: Sequence[Any], path: str, gated: bool) -> tuple[str, str, str]:
    """What the checkpoint calls gate, up and down of one expert, such as w1, w3 and w2."""
    names = dict(zip(("gate", "up", "down"), _LEAVES, strict=True))
    for rule in rules:
        for position, pattern in enumerate(rule.source_patterns):
            # Apply the rule to a name of expert 0, and see which fused parameter it becomes.
            leaf = pattern.rpartition("*.")[2].removesuffix(".weight")
            target, matched = rule.rename_source_key(f"{path}.0.{leaf}.weight")
            if matched != pattern or not leaf.isidentifier():
                continue
            if target == f"{path}.down_proj":
                names["down"] = leaf
            elif gated and target == f"{path}.gate_up_proj" and position < 2:
                names["gate" if position == 0 else "up"] = leaf
            elif not gated and target == f"{path}.up_proj":
                names["up"] = leaf
    return names["gate"], names["up"], names["down"]


# --- routers ---


def find_routers(block: nn.Module) -> set[str]:
    """Relative names of the linears that choose experts or weigh them. No method prunes these.

    A router is a linear in a module next to `experts`, with one output per expert or one output
    (the gate of a shared expert). A module next to them that returns as many features as it takes,
    such as attention or a shared expert, passes hidden states on and holds no router.
    """
    routers = set()
    for path, module in block.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, Experts | nn.ModuleList):
            continue
        count = experts.count if isinstance(experts, Experts) else len(experts)
        for name, neighbour in module.named_children():
            inside = [(n, x) for n, x in neighbour.named_modules() if isinstance(x, nn.Linear)]
            if neighbour is experts or (
                len(inside) > 1 and inside[0][1].in_features == inside[-1][1].out_features
            ):
                continue
            for inner, linear in inside:
                if linear.out_features in (1, count):
                    routers.add(".".join(filter(None, (path, name, inner))))
    return routers
