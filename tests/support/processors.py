"""Processors that differ in what they multiply natively, whatever processor runs the tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from prunus.hardware import numerics


@contextmanager
def processor_threads(count: int) -> Iterator[None]:
    """While active, torch computes on this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def processor(native_bfloat16: bool) -> Iterator[None]:
    """While active, prunus takes the branches of a processor with or without bfloat16 products.

    torch computes the same on both, only at another speed. So every branch runs on any machine.
    """
    with pytest.MonkeyPatch.context() as patch:
        for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            patch.setattr(torch.cpu, check, lambda: native_bfloat16)
        numerics.native_bfloat16.cache_clear()
        yield
    numerics.native_bfloat16.cache_clear()
