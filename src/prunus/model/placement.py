"""Giving the modules of a skeleton their weights, and taking them away again."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

__all__ = [
    "advise",
    "fill_with_zeros",
    "move_buffers",
    "parameters_on_meta",
    "place",
    "release",
    "rows_alone",
    "whole_pages",
]


def place(
    module: nn.Module,
    values: Mapping[str, torch.Tensor],
    device: torch.device | None = None,
    by_rows: Collection[int] = (),
) -> None:
    """Replace parameters and buffers by `values`, converted to the dtype that each has in the skeleton.

    Floating-point values are copied, so that no mapped file is kept alive. Tied parameters stay tied. Parameters
    `by_rows` (the `id` of each) stay as stored, and in their file, on a processor; see `rows_alone`.
    """
    replaced: dict[int, nn.Parameter] = {}
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        old = owner._parameters.get(leaf)
        if old is None:
            buffer = owner._buffers[leaf]
            assert buffer is not None
            owner._buffers[leaf] = value.to(
                device=device or value.device, dtype=buffer.dtype, copy=True
            )
            continue
        to = device or value.device
        if id(old) in by_rows and to.type == value.device.type == "cpu":
            new = value.detach()
            if hasattr(mmap, "MADV_RANDOM"):  # of a mapped file nothing is read ahead
                advise(new, mmap.MADV_RANDOM)
        else:
            new = value.to(device=to, dtype=old.dtype, copy=True)
        replaced[id(old)] = nn.Parameter(new, requires_grad=False)
    for owner in module.modules():
        for leaf, old in owner._parameters.items():
            if old is not None and id(old) in replaced:
                owner._parameters[leaf] = replaced[id(old)]


def whole_pages(tensor: torch.Tensor) -> range:
    """Addresses of the whole pages that a contiguous tensor takes; none where it fills no page."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    return range(first, (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE)


def advise(tensor: torch.Tensor, advice: int) -> None:
    """Tell the system how the whole pages of a tensor are used; `advice` is one of mmap's MADV_*."""
    if pages := whole_pages(tensor):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(pages.start), ctypes.c_size_t(len(pages)), advice)


@contextlib.contextmanager
def rows_alone(embedding: nn.Module, dtype: torch.dtype) -> Iterator[Collection[int]]:
    """While active, a plain embedding gives rows in `dtype` of a weight that may be in another.

    So none but the rows asked for need be read, converted or kept. Yields what `place` is to leave as it is. At the end
    the weight is expected to be back on the meta device.
    """
    if type(embedding) is not nn.Embedding:  # others may compute with the weight
        yield ()
        return
    look_up = embedding.forward
    embedding.forward = lambda *args, **named: look_up(*args, **named).to(dtype)  # type: ignore[method-assign]
    try:
        yield (id(embedding.weight),)
    finally:
        embedding.__dict__.pop("forward", None)
        embedding.to(dtype)


def release(module: nn.Module) -> None:
    """Send every parameter back to the meta device; ties are kept."""
    empty: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for leaf, old in owner._parameters.items():
            if old is not None and old.device.type != "meta":
                new = empty.setdefault(id(old), nn.Parameter(old.to("meta"), requires_grad=False))
                owner._parameters[leaf] = new


def fill_with_zeros(module: nn.Module, device: torch.device) -> None:
    """Parameters of zeros that take no memory: one element each, read again and again."""
    for owner in module.modules():
        move_buffers(owner, device)
        for leaf, old in owner._parameters.items():
            if old is not None:
                zeros = torch.zeros((), dtype=old.dtype, device=device).expand(old.shape)
                owner._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While active, every parameter that a module registers goes to the meta device; buffers stay real."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Send the buffers of this one module to `device`."""
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.device != device:
            module._buffers[name] = buffer.to(device)
