"""Which tensors of a block become smaller, and along which axis.

Nothing here knows the families. The model that the new configuration describes is built without
weights, and its shapes are compared with those of the old one. Where an axis is shorter, it is cut;
where any other difference shows, the request is refused before any work. So a tensor is cut exactly
where transformers will expect it to be.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn

from prunus.model.experts import Experts
from prunus.model.skeleton import Skeleton

__all__ = ["axis_that_changes", "check_same_blocks", "cut", "old_names", "shapes_of"]

#: Attributes of modules that say where a module stands, and not what it computes.
_PLACES = {"layer_idx", "layer_id", "layer_index", "training"}


def shapes_of(block: nn.Module) -> dict[str, tuple[int, ...]]:
    """Relative name -> shape of all tensors that a checkpoint stores of a block."""
    return {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}


def old_names(block: nn.Module, new: Collection[str], kept: Sequence[int]) -> dict[str, str]:
    """New name -> old name of the tensors of a block in which only some experts stay.

    Args:
        block: the old block.
        new: relative names in the new block.
        kept: the experts that stay; empty if no expert goes.
    """
    paths = (
        [n for n, module in block.named_modules() if isinstance(module, Experts)] if kept else []
    )
    found = {}
    for name in new:
        found[name] = name
        for path in paths:
            match = re.match(rf"{re.escape(path)}\.(\d+)\.", name)
            if match:
                found[name] = f"{path}.{kept[int(match[1])]}.{name[match.end() :]}"
    return found


def axis_that_changes(old: Sequence[int], new: Sequence[int]) -> int | None:
    """The one axis in which two shapes differ; None if they are equal.

    >>> axis_that_changes((8, 32), (6, 32)), axis_that_changes((8, 32), (8, 32))
    (0, None)

    Raises:
        ValueError: they differ in more than one axis.
    """
    differ = [axis for axis, sizes in enumerate(zip(old, new, strict=False)) if len({*sizes}) > 1]
    if len(old) != len(new) or len(differ) > 1:
        raise ValueError(f"shapes {tuple(old)} and {tuple(new)} differ in more than one axis")
    return differ[0] if differ else None


def cut(tensor: Tensor, axis: int | None, kept: Sequence[int]) -> Tensor:
    """The entries `kept` of an axis of a tensor, with the same bytes; all of it if axis is None."""
    return tensor if axis is None else tensor.index_select(axis, torch.tensor(list(kept)))


def check_same_blocks(
    old: Skeleton, new: Skeleton, kept: Sequence[int], may_change: AbstractSet[tuple[int, int]]
) -> None:
    """Check that each block of a smaller model computes what the old block did, but for its sizes.

    Compared are the classes of all modules, their plain attributes, and the shapes of all tensors.
    A family whose blocks depend on their position in another way than by a list in the
    configuration shows here.

    Args:
        old: the model.
        new: the smaller model.
        kept: the old block of each new one.
        may_change: pairs of an old size and a new one, of what becomes smaller.

    Raises:
        NotImplementedError: something else differs; names it.
    """
    for place, index in enumerate(kept):
        before, after = old.blocks[index], new.blocks[place]
        name = new.block_name(place)
        left = {n: m for n, m in before.named_modules() if not _in_experts(n, before)}
        right = {n: m for n, m in after.named_modules() if not _in_experts(n, after)}
        if left.keys() != right.keys():
            odd = sorted(left.keys() ^ right.keys())[0]
            raise NotImplementedError(_other(name, f"one of them has no {odd!r}"))
        for path, module in left.items():
            other = right[path]
            if type(module) is not type(other):
                raise NotImplementedError(_other(name, f"{path} is of another class"))
            for key, value in _plain(module).items():
                now = _plain(other).get(key)
                if now != value and not _is_change(value, now, may_change):
                    raise NotImplementedError(
                        _other(name, f"{path}.{key} is {now!r} instead of {value!r}")
                    )
        _check_shapes(before, after, name, may_change)


def _check_shapes(
    before: nn.Module, after: nn.Module, name: str, may_change: AbstractSet[tuple[int, int]]
) -> None:
    """Check that tensors of two blocks, apart from those of experts, differ in one axis at most.

    Raises:
        NotImplementedError: they differ in another way; names the tensor.
    """
    now = shapes_of(after)
    for key, shape in shapes_of(before).items():
        if _in_experts(key, before):
            continue
        other = now.get(key, ())
        pairs = [(b, a) for b, a in zip(shape, other, strict=False) if b != a]
        fits = (
            len(other) == len(shape)
            and len(pairs) <= 1
            and all(pair in may_change for pair in pairs)
        )
        if not fits:
            raise NotImplementedError(
                _other(name, f"{key} has shape {now.get(key)} instead of {shape}")
            )


def _other(name: str, what: str) -> str:
    return (
        f"{name} of the smaller model would not compute what the block does that it is made from: "
        f"{what}. The configuration of this family cannot describe such a model"
    )


def _in_experts(name: str, block: nn.Module) -> bool:
    """Whether a module or a tensor belongs to a single expert."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        if parts[length].isdigit():
            owner = block.get_submodule(".".join(parts[:length]))
            return isinstance(owner, Experts)
    return False


def _plain(module: nn.Module) -> dict[str, object]:
    """The attributes of a module that are numbers, texts, truth values or None."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and key not in _PLACES
        and (value is None or isinstance(value, int | float | str | bool))
    }


def _is_change(before: object, after: object, may_change: AbstractSet[tuple[int, int]]) -> bool:
    return (before, after) in may_change
