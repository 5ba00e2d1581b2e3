"""Which tensors of a block a smaller model has, and whether it computes the same.

Nothing here knows the families. The model that the new configuration describes is built without
weights, and its shapes are compared with those of the old one. Only axes with an entry per expert
may be shorter; any other difference is refused before any work. So a tensor is cut exactly where
transformers expects it to be.

Names of tensors and modules here are relative to their block, such as `mlp.down_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn

from prunus.model.experts import Experts
from prunus.model.skeleton import Skeleton

#: Attributes of modules that tell the position of a module, and not what it computes.
_POSITIONS = {"layer_idx", "layer_id", "layer_index", "training"}


def shapes_of(block: nn.Module) -> dict[str, tuple[int, ...]]:
    """Relative name -> shape of all tensors that a checkpoint stores of a block."""
    return {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}


def experts_in(block: nn.Module) -> list[Experts]:
    """The mixtures of experts of a block; empty for a dense block."""
    return [module for module in block.modules() if isinstance(module, Experts)]


def with_experts(
    block: nn.Module,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    kept: Sequence[int],
) -> dict[str, Tensor]:
    """The tensors of a block in which only some experts stay, with the same bytes.

    Args:
        block: The old block.
        tensors: Its tensors.
        shapes: Name -> shape of the tensors of the new block, whose experts count from 0 again.
        kept: Old numbers of the experts that stay, in their new order.
    """
    # `plan_structure` refuses blocks with several mixtures.
    (path,) = (f"{name}." for name, module in block.named_modules() if isinstance(module, Experts))
    found = {}
    for name, shape in shapes.items():
        number, _, rest = name.removeprefix(path).partition(".")
        in_expert = name.startswith(path) and number.isdigit()
        tensor = tensors[f"{path}{kept[int(number)]}.{rest}" if in_expert else name]
        # A router has an entry per expert; `check_same_blocks` found at most one such axis.
        axis = next((i for i, size in enumerate(shape) if tensor.shape[i] != size), None)
        found[name] = tensor if axis is None else tensor.index_select(axis, torch.tensor(kept))
    return found


def check_same_blocks(
    old: Skeleton, new: Skeleton, made_from: Sequence[int], may_change: AbstractSet[tuple[int, int]]
) -> None:
    """Check that each block of a smaller model computes what the old one did, but for its experts.

    Classes of modules, their plain attributes and shapes of tensors are compared, outside single
    experts, whose numbers change. This refuses families whose blocks depend on their position by
    more than a list in the configuration.

    Args:
        old: The model, without weights.
        new: The smaller model, without weights.
        made_from: The old position of each block of `new`.
        may_change: The pairs (size before, size after) of all that counts experts.

    Raises:
        NotImplementedError: Something else differs; the message names it.
    """
    for new_index, old_index in enumerate(made_from):
        different = _difference(old.blocks[old_index], new.blocks[new_index], may_change)
        if different is not None:
            raise NotImplementedError(
                f"{new.block_name(new_index)} of the smaller model would not compute what the "
                f"block does that it is made from: {different}. The configuration of this family "
                "cannot describe such a model"
            )


def _difference(
    before: nn.Module, after: nn.Module, may_change: AbstractSet[tuple[int, int]]
) -> str | None:
    """The first difference between two blocks, in words: of classes, attributes or shapes."""
    modules, others = (
        {name: module for name, module in block.named_modules() if not _in_experts(name, block)}
        for block in (before, after)
    )
    if modules.keys() != others.keys():  # `min`, so that the message is the same in every run
        return f"one of them has no {min(modules.keys() ^ others.keys())!r}"
    for path, module in modules.items():
        if type(module) is not type(others[path]):
            return f"{path} is of another class"
        now = _plain(others[path])
        for key, value in _plain(module).items():
            if now.get(key) != value and (value, now.get(key)) not in may_change:
                return f"{path}.{key} is {now.get(key)!r} instead of {value!r}"
    shapes = shapes_of(after)
    for name, shape in shapes_of(before).items():
        other = shapes.get(name, ())
        pairs = [pair for pair in zip(shape, other, strict=False) if pair[0] != pair[1]]
        # One axis alone may be shorter, and only by a pair that was planned.
        fits = len(other) == len(shape) and len(pairs) <= 1 and {*pairs} <= may_change
        if not fits and not _in_experts(name, before):
            return f"{name} has shape {shapes.get(name)} instead of {shape}"
    return None


def _in_experts(name: str, block: nn.Module) -> bool:
    """Whether a module or a tensor belongs to a single expert."""
    parts = name.split(".")
    return any(
        parts[length].isdigit()
        and isinstance(block.get_submodule(".".join(parts[:length])), Experts)
        for length in range(1, len(parts))
    )


def _plain(module: nn.Module) -> dict[str, object]:
    """The attributes of a module that are numbers, texts, truth values or None."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and key not in _POSITIONS
        and (value is None or isinstance(value, int | float | str | bool))
    }
