"""Where a model keeps its blocks, and the weight matrices of a block: which can be pruned.

A linear is any module that multiplies the last axis of its input by one matrix: `nn.Linear` of
torch, and the transposed `Conv1D` of GPT-2. All other code sees its weight as (out, in).

Outline: `find_block_list`; `Linear` and the functions that find linears; `refuse_not_finite`, which
explains a result that is not finite.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunus.hardware.numerics import all_finite, check_finite
from prunus.model.experts import Experts, find_routers

#: model_type -> path of the module list, where the declaration of transformers is not enough.
BLOCK_LISTS: dict[str, str] = {
    "convnextv2": "convnextv2.encoder.stages",
    "distilbert": "distilbert.transformer.layer",
    "electra": "electra.encoder.layer",
    "mpnet": "mpnet.encoder.layer",
    "roformer": "roformer.encoder.layer",
}


def find_block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the module list of a model's transformer blocks, or of its stages.

    transformers itself says where: `_no_split_modules` names the classes that must stay on one
    device, and the blocks of a decoder are a module list of such classes.

    Raises:
        NotImplementedError: There is no list of blocks, or more than one that could be meant.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type in BLOCK_LISTS:
        path = BLOCK_LISTS[model_type]
        return path, cast(nn.ModuleList, model.get_submodule(path))
    block_classes = set(getattr(model, "_no_split_modules", None) or ())
    stacks = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(type(child).__name__ in block_classes for child in module)
    }
    # A stage of ConvNeXt holds a list of layers itself. The outer list counts: a block is a stage,
    # with the downsampling before its layers.
    stacks = {
        path: module
        for path, module in stacks.items()
        if not any(path.startswith(f"{other}.") for other in stacks)
    }
    if len(stacks) > 1:
        # An image-text model: its language model is one of several towers.
        decoder: Any = getattr(model, "get_decoder", lambda: None)()
        inside = {id(x) for x in decoder.modules()} if decoder is not None else ()
        stacks = {path: x for path, x in stacks.items() if id(x) in inside} or stacks
    if not stacks:
        raise NotImplementedError(
            f"no transformer blocks found in {type(model).__name__} (model type {model_type!r}): "
            "none of its module lists consists of "
            f"{sorted(block_classes) or 'declared block classes'}. docs/how-to/add-a-family.md "
            "says how to name the list of such a model"
        )
    if len(stacks) > 1:
        raise NotImplementedError(
            f"{type(model).__name__} has several stacks of blocks ({', '.join(stacks)}); prunus "
            "prunes models with one. docs/how-to/add-a-family.md says how to name the one to prune"
        )
    return next(iter(stacks.items()))


#: Names under which some families store query, key and value in one matrix.
JOINED_ATTENTION = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")
#: Last parts of the names of linears that make queries, keys and values.
_FEEDS_ATTENTION = frozenset(
    ("q_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj", *JOINED_ATTENTION)
)
#: The part of a block in which a linear is. "other" is for the head, and for blocks that mix tokens
#: without attention.
Kind = Literal["attention", "mlp", "expert", "other"]


@dataclass(frozen=True, slots=True)
class Linear:
    """One prunable linear of a block.

    >>> linear = Linear("c_fc", Conv1D(3, 2))  # 3 outputs, 2 inputs
    >>> linear.transposed, linear.shape, tuple(linear.parameter.shape)
    (True, (3, 2), (2, 3))
    >>> linear.assign(torch.zeros(3, 2))
    >>> linear.weight_OI.count_nonzero().item()
    0
    """

    name: str  #: relative to the block, e.g. `self_attn.q_proj`
    module: nn.Module  #: an `nn.Linear` or a `Conv1D`
    kind: Kind = "other"  #: the part of the block in which it is

    @property
    def transposed(self) -> bool:
        """Whether the module stores (in, out), as GPT-2's Conv1D does."""
        return isinstance(self.module, Conv1D)

    @property
    def feeds_attention(self) -> bool:
        """Whether its outputs are queries, keys or values, by its name.

        >>> Linear("self_attn.v_proj", nn.Linear(2, 2)).feeds_attention
        True
        """
        return self.name.rpartition(".")[2] in _FEEDS_ATTENTION

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features), however the module stores them."""
        rows, columns = self.parameter.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the module has it: (out, in), or (in, out) if it is `transposed`."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def weight_OI(self) -> torch.Tensor:
        """The weight as an (out, in) view, in the dtype of the computation."""
        weight = self.parameter.detach()
        return weight.T if self.transposed else weight

    def assign(self, weight_OI: torch.Tensor) -> None:
        """Overwrite the weight in place, converting to the dtype of the computation."""
        self.weight_OI.copy_(weight_OI)


def find_linears(block: nn.Module) -> list[Linear]:
    """The prunable linears of a block, in the order in which they are registered.

    Routers of experts are not among them: they are small, and a pruned one sends tokens to other
    experts.

    >>> [linear.name for linear in find_linears(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))]
    ['0']
    """
    routers = find_routers(block)
    return [
        Linear(name, module, _kind(block, name))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in routers
    ]


def _kind(block: nn.Module, name: str) -> Kind:
    """The part of a block in which a linear is, by the classes of the modules that contain it."""
    path = name.split(".")[:-1]
    around = [block.get_submodule(".".join(path[:end])) for end in range(1, len(path) + 1)]
    classes = " ".join(type(module).__name__.lower() for module in around)
    if any(isinstance(module, Experts) for module in around):
        return "expert"
    if "attention" in classes or "attn" in classes:
        return "attention"
    # OPT and others have the two linears of their MLP in the block itself.
    is_mlp = not around or any(word in classes for word in ("mlp", "feedforward", "ffn"))
    return "mlp" if is_mlp else "other"


def left_dense(block: nn.Module, linears: list[Linear]) -> dict[str, tuple[int, ...]]:
    """Weights of two or more dimensions in `block` that are not among `linears`: name -> shape.

    Names are relative to the block.

    Raises:
        NotImplementedError: Experts are fused into one parameter in an unfamiliar form. Most of
            such a model would stay dense without a word.
    """
    taken = {id(parameter) for linear in linears for parameter in linear.module.parameters()}
    dense: dict[str, tuple[int, ...]] = {}
    for module_name, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}".lstrip(".")
            if parameter.dim() < 2 or id(parameter) in taken:
                continue
            is_convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            if parameter.dim() >= 3 and not is_convolution and parameter.shape[0] > 1:
                raise NotImplementedError(
                    f"{full_name} of shape {tuple(parameter.shape)} looks like experts fused into "
                    "one parameter in a form that prunus does not know; such a mixture of experts "
                    "cannot be pruned yet. docs/reference/models.md lists what can"
                )
            dense[full_name] = tuple(parameter.shape)
    return dense


def refuse_not_finite(
    linears: Mapping[str, Linear], run: Callable[[], object], what: str
) -> NoReturn:
    """Raise the error of a computation whose results are not finite; it names where that begins.

    It looks at the weights first. Then the computation runs again, and the first linear that gets
    an input with infinite or NaN values is the one to name.

    Args:
        linears: The linears of the computation, by full name. Their forward methods stay replaced.
        run: Runs the computation again.
        what: What is not finite if no linear gets such an input, as the subject of a sentence.

    Raises:
        ValueError: Always.
    """
    check_finite({f"{name}.weight": linear.parameter for name, linear in linears.items()})
    reached: list[str] = []

    def watch(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(x: torch.Tensor, *others: Any, **options: Any) -> Any:
            if not all_finite(x):
                reached.append(name)
            return forward(x, *others, **options)

        return watched

    for name, linear in linears.items():  # nothing is computed with them afterwards
        linear.module.forward = watch(name, linear.module.forward)
    run()
    what = f"the activations that reach {reached[0]}" if reached else what
    raise ValueError(
        f"{what} are not finite. Weights are damaged, or the dtype is too small for this model: "
        "try `dtype` float32"
    )
