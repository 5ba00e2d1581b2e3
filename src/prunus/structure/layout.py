"""Which tensors of a block become smaller, and along which axis.

Nothing here knows the families. The model that the new configuration describes is built without
weights, and its shapes are compared with those of the old one. Where an axis is shorter, the tensor
is cut; any other difference is refused before any work. So a tensor is cut exactly where
transformers expects it to be.

Names of tensors and modules here are relative to their block, such as `mlp.down_proj.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
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


def old_names(block: nn.Module, new: Collection[str], kept: Sequence[int]) -> dict[str, str]:
    """New name -> old name of the tensors of a block in which only some experts stay.

    Args:
        block: The old block.
        new: Names of the tensors of the new block, whose experts count from 0 again.
        kept: Old numbers of the experts that stay, in their new order.
    """
    old_by_new = {name: name for name in new}
    for path in (name for name, module in block.named_modules() if isinstance(module, Experts)):
        for name in new:
            match = re.match(rf"{re.escape(path)}\.(\d+)\.", name)
            if match:
                old_by_new[name] = f"{path}.{kept[int(match[1])]}.{name[match.end() :]}"
    return old_by_new


def axis_that_changes(old: Sequence[int], new: Sequence[int]) -> int | None:
    """The one axis in which two shapes differ; None if they are equal.

    Raises:
        ValueError: They differ in more than one axis, or in the number of axes.

    >>> axis_that_changes((8, 32), (6, 32)), axis_that_changes((8, 32), (8, 32))
    (0, None)
    """
    differ = [axis for axis, sizes in enumerate(zip(old, new, strict=False)) if len({*sizes}) > 1]
    if len(old) != len(new) or len(differ) > 1:
        raise ValueError(f"shapes {tuple(old)} and {tuple(new)} differ in more than one axis")
    return differ[0] if differ else None


def cut(tensor: Tensor, axis: int | None, kept: Sequence[int]) -> Tensor:
    """The entries `kept` of an axis of a tensor, with the same bytes; all of it if axis is None.

    >>> cut(torch.tensor([[1, 2, 3]]), 1, [0, 2])
    tensor([[1, 3]])
    """
    return tensor if axis is None else tensor.index_select(axis, torch.tensor(list(kept)))


def check_same_blocks(
    old: Skeleton, new: Skeleton, kept: Sequence[int], may_change: AbstractSet[tuple[int, int]]
) -> None:
    """Check that each block of a smaller model computes what the old block did, but for its sizes.

    Classes of modules, their plain attributes and shapes of tensors are compared, outside single
    experts, whose numbers change. This refuses families whose blocks depend on their position by
    more than a list in the configuration.

    Args:
        old: The model, without weights.
        new: The smaller model, without weights.
        kept: The old position of each block of `new`.
        may_change: The pairs (size before, size after) of all that becomes smaller.

    Raises:
        NotImplementedError: Something else differs; the message names it.
    """
    for new_index, old_index in enumerate(kept):
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
