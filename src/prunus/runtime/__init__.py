"""Packed models as they run: the CPU kernels, loading through transformers, fast decoding.

describe            say which kernels run on this machine, and why
reference_path      a context in which packed models compute exactly as unpacked ones
PackedLinear        the module that computes with a packed weight
DenseLinear         a dense linear that uses the kernels as well
use_dense_kernel    give a loaded dense model such linears
use_fast_decoding   give it the blocks, attention and memory of packed models

`prunus.pack` and `prunus.unpack` write such checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.runtime.doctor import describe
    from prunus.runtime.fast_decoding import use_fast_decoding
    from prunus.runtime.linear import DenseLinear, PackedLinear, use_dense_kernel
    from prunus.runtime.operators import reference_path

__all__ = [
    "DenseLinear",
    "PackedLinear",
    "describe",
    "reference_path",
    "use_dense_kernel",
    "use_fast_decoding",
]

# Module -> names that it defines. They are imported when they are first used, so that
# `import prunus` does not wait for torch.
_HOMES = {
    "doctor": ("describe",),
    "fast_decoding": ("use_fast_decoding",),
    "linear": ("DenseLinear", "PackedLinear", "use_dense_kernel"),
    "operators": ("reference_path",),
}


def __getattr__(name: str) -> Any:
    """A name of `_HOMES`, imported when it is first used."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
