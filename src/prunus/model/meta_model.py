"""A transformers model on the meta device: built within limits, given weights, and emptied again.

There, parameters have a shape but no memory. Buffers, such as the frequencies of rotary embeddings,
are tables that no checkpoint stores: transformers computes them in the end. Their sizes are known
before that, and modules are counted while they are made. So a damaged configuration cannot fill
memory.

Outline: `build_on_meta` with its limits; then the functions that give a model on the meta device
its weights (`place`), and take them away (`release`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from threading import get_ident
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from prunus.model.kinds import Kind
from prunus.words import reason

#: Modules of a model. A model of 61 blocks with 384 experts each has 94,000.
_MAX_MODULES = 2**17
#: Bytes of all tables together that a model may compute before it has any weight.
_MAX_COMPUTED = 2**31


@contextlib.contextmanager
def limited_modules() -> Iterator[None]:
    """While active, a ValueError ends the making of more than `_MAX_MODULES` modules.

    The modules that other threads make meanwhile are theirs, and do not count.
    """
    count, thread = 0, get_ident()

    def counted(*_: Any) -> None:
        nonlocal count
        count += get_ident() == thread
        if count > _MAX_MODULES and get_ident() == thread:
            raise ValueError(f"it has more than {_MAX_MODULES:,} modules")

    with register_module_module_registration_hook(counted):
        yield


def build_on_meta(kind: Kind, config: Any, dtype: Any, trust_remote_code: bool) -> Any:
    """The transformers model of a configuration, with its parameters on the meta device.

    Args:
        kind: The kind of the model, which names the class that loads it.
        config: Its transformers configuration, which does not change.
        dtype: Dtype of the parameters.
        trust_remote_code: Let transformers run code that comes with the checkpoint.

    Raises:
        ValueError: transformers makes no model of this configuration, or one beyond all limits.
        ImportError: The model needs a package that is not installed.
    """
    loader = getattr(transformers, kind.loader)
    try:
        # What code computes while it is imported must not be on the meta device.
        importlib.import_module("transformers.modeling_utils")
        loader._model_mapping.get(type(config), None)
        with torch.device("meta"), limited_modules():
            model = loader.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
            )
        # Some parameters are made in memory whatever the device, but are not written to.
        release(model)
        _compute_tables(model)
        return model
    except ImportError:
        raise
    except Exception as fault:
        # A damaged configuration can raise any error, anywhere in the code of a model. The first
        # line has the reason; then transformers may list a hundred classes it would accept.
        first = ValueError((str(fault).strip().splitlines() or [""])[0])
        raise ValueError(
            f"transformers makes no {kind.name} of model type {config.model_type!r} and this "
            f"configuration: {type(fault).__name__}: {reason(first)}"
        ) from fault


def _compute_tables(model: nn.Module) -> None:
    """Give the buffers of a model memory and fill them, as `from_pretrained` does."""
    if sum(buffer.nbytes for buffer in model.buffers()) > _MAX_COMPUTED:
        raise ValueError(
            f"it asks for more than {_MAX_COMPUTED:,} bytes of tables before it has any weights, "
            "such as one row for each of its positions"
        )
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros_like(buffer, device="cpu"))
    # transformers passes over parameters with this mark, as if they were loaded already.
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()  # type: ignore[operator]


# --- weights of a model on the meta device ---


def place(
    module: nn.Module,
    values: Mapping[str, torch.Tensor],
    device: torch.device,
    as_stored: Collection[int] = (),
) -> None:
    """Replace parameters and buffers of `module` by `values`. Tied parameters stay tied.

    Args:
        module: Its parameters are on the meta device.
        values: Tensors by name relative to `module`. Each is copied, so that no memory of the
            reader stays alive, and converted to the dtype that the parameter has in the skeleton.
        device: Where they go.
        as_stored: The `id` of each parameter that is neither converted nor copied on the CPU.
    """
    # The `id` of a parameter -> its values.
    placed: dict[int, torch.Tensor] = {}
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        old = getattr(owner, leaf)
        if not isinstance(old, nn.Parameter):
            setattr(owner, leaf, value.to(device=device, dtype=old.dtype, copy=True))
            continue
        if id(old) in as_stored and device.type == value.device.type == "cpu":
            placed[id(old)] = value.detach()
        elif device.type == "cpu":
            placed[id(old)] = value.to(device, old.dtype, copy=True)
        else:
            # The tensor is copied as it is stored. The device converts it, which is faster.
            # From pinned memory it is copied while the host continues.
            copied = value.to(device, copy=True, non_blocking=value.is_pinned())
            placed[id(old)] = copied.to(old.dtype)
    # In a second pass over all owners, because a tied parameter has several.
    _replace(module, lambda old: placed.get(id(old)))


def _replace(module: nn.Module, values: Callable[[nn.Parameter], torch.Tensor | None]) -> None:
    """Give every parameter the values that a function returns for it; tied ones stay tied.

    Args:
        module: The module whose parameters are replaced, also those of its children.
        values: From a parameter to its new values; None keeps the parameter.
    """
    # The `id` of a parameter -> its successor.
    successors: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for leaf, old in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if id(old) not in successors and (new := values(old)) is not None:
                successors[id(old)] = nn.Parameter(new, requires_grad=False)
            if id(old) in successors:
                setattr(owner, leaf, successors[id(old)])


def release(module: nn.Module) -> None:
    """Send every parameter back to the meta device; tied parameters stay tied."""
    _replace(module, lambda old: None if old.device.type == "meta" else old.to("meta"))


def fill_with_zeros(module: nn.Module, device: torch.device) -> None:
    """Give every parameter zeros that take no memory: one element, expanded to the whole shape.

    A module with such weights runs, but its weights cannot be written to.
    """
    move_buffers(module.modules(), device)
    _replace(module, lambda old: torch.zeros((), dtype=old.dtype, device=device).expand(old.shape))


def move_buffers(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Send the buffers of some modules, without their children, to `device`."""
    for module in modules:
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
