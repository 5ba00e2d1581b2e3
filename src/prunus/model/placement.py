"""Giving the modules of a skeleton their weights, and taking the weights away again.

A parameter on the meta device has a shape and a dtype but no memory. A model of any size can be
built of such parameters; only the block in work gets real ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from prunus.model.calls import replaced_forward


def place(
    module: nn.Module,
    values: Mapping[str, torch.Tensor],
    device: torch.device | None = None,
    as_stored: Collection[int] = (),
) -> None:
    """Replace parameters and buffers of `module` by `values`. Tied parameters stay tied.

    Args:
        values: tensors by name relative to `module`. Each is converted to the dtype that the
            parameter has in the skeleton, and copied, so that no mapped file is kept alive.
        device: where they go; None leaves each where it is.
        as_stored: `id` of each parameter that is not converted or copied on the CPU, but stays a
            view of its mapped file; see `embedding_as_stored`.
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
        if id(old) in as_stored and to.type == value.device.type == "cpu":
            new = value.detach()
            if hasattr(mmap, "MADV_RANDOM"):
                # Rows are read here and there; reading ahead would fill memory with other rows.
                advise(new, mmap.MADV_RANDOM)
        else:
            # The tensor travels as it is stored. The device converts it, which is faster.
            # From pinned memory it travels while the host continues.
            there = value.to(device=to, copy=True, non_blocking=value.is_pinned())
            new = there.to(old.dtype)
        replaced[id(old)] = nn.Parameter(new, requires_grad=False)
    # In a second pass over all owners, because a tied parameter has several.
    for owner in module.modules():
        for leaf, old in owner._parameters.items():
            if old is not None and id(old) in replaced:
                owner._parameters[leaf] = replaced[id(old)]


def whole_pages(tensor: torch.Tensor) -> range:
    """Addresses of the memory pages that a contiguous tensor fills; empty if it fills none."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    return range(first, (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE)


def advise(tensor: torch.Tensor, advice: int) -> None:
    """Tell the system how a tensor's whole pages will be used; `advice` is one of mmap's MADV_*."""
    if pages := whole_pages(tensor):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(pages.start), ctypes.c_size_t(len(pages)), advice)


@contextlib.contextmanager
def embedding_as_stored(embedding: nn.Module, dtype: torch.dtype) -> Iterator[Collection[int]]:
    """While active, an embedding may keep its weight as stored, and gives rows in `dtype`.

    Calibration looks up a small part of the vocabulary. So the weight stays a mapped file, and only
    the rows that are looked up are read and converted.

    The weight must be back on the meta device when the block ends.

    Yields:
        What to pass to `place` as `as_stored`; empty if this is no plain `nn.Embedding`, as
        subclasses may compute with their weight.
    """
    if type(embedding) is not nn.Embedding:
        yield ()
        return
    look_up = embedding.forward
    try:
        with replaced_forward(embedding, lambda *args, **named: look_up(*args, **named).to(dtype)):
            yield (id(embedding.weight),)
    finally:
        embedding.to(dtype)


def release(module: nn.Module) -> None:
    """Send every parameter back to the meta device; tied parameters stay tied."""
    empty: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for leaf, old in owner._parameters.items():
            if old is not None and old.device.type != "meta":
                new = empty.setdefault(id(old), nn.Parameter(old.to("meta"), requires_grad=False))
                owner._parameters[leaf] = new


def fill_with_zeros(module: nn.Module, device: torch.device) -> None:
    """Give every parameter zeros that take no memory: one element, expanded to the whole shape."""
    for owner in module.modules():
        move_buffers(owner, device)
        for leaf, old in owner._parameters.items():
            if old is not None:
                zeros = torch.zeros((), dtype=old.dtype, device=device).expand(old.shape)
                owner._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Send the buffers of this module, without its children, to `device`."""
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.device != device:
            module._buffers[name] = buffer.to(device)
