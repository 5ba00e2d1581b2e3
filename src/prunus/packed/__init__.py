"""Running pruned models: the bitmap format, the kernels, loading through transformers.

pack            write a pruned checkpoint with its linears as bitmaps
unpack          and back
describe        which kernels run here, and why
reference_path  a context in which packed models compute exactly as unpacked ones
BitmapLinear    the module that runs on a bitmap
DenseLinear     a dense linear that uses the kernels too
use_dense_kernel    give a loaded dense model such linears
use_fast_decoding   and the attention, norms, rotary embedding and memory that packed models have
to_semi_structured  on a CUDA device: 2:4 linears on sparse tensor cores, where that is faster
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.packed.decoding import use_fast_decoding
    from prunus.packed.doctor import describe
    from prunus.packed.linear import BitmapLinear, DenseLinear, use_dense_kernel
    from prunus.packed.operators import reference_path
    from prunus.packed.packing import pack, unpack
    from prunus.packed.semi_structured import to_semi_structured

__all__ = [
    "BitmapLinear",
    "DenseLinear",
    "describe",
    "pack",
    "reference_path",
    "to_semi_structured",
    "unpack",
    "use_dense_kernel",
    "use_fast_decoding",
]

# Imported when first used, so that `import prunus` need not wait for torch.
_HOMES = {
    "BitmapLinear": "linear",
    "DenseLinear": "linear",
    "describe": "doctor",
    "pack": "packing",
    "reference_path": "operators",
    "to_semi_structured": "semi_structured",
    "unpack": "packing",
    "use_dense_kernel": "linear",
    "use_fast_decoding": "decoding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
