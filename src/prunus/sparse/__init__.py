"""Running pruned models: the bitmap format, the kernels, loading through transformers.

pack            write a pruned checkpoint with its linears as bitmaps
unpack          and back
describe        which kernels run here, and why
reference_path  a context in which packed models compute exactly as unpacked ones
BitmapLinear    the module that runs on a bitmap
DenseLinear     a dense linear that uses the kernels too
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.sparse.doctor import describe
    from prunus.sparse.linear import BitmapLinear, DenseLinear
    from prunus.sparse.operators import reference_path
    from prunus.sparse.packing import pack, unpack

__all__ = ["BitmapLinear", "DenseLinear", "describe", "pack", "reference_path", "unpack"]

# Imported when first used, so that `import prunus` need not wait for torch.
_HOMES = {
    "BitmapLinear": "linear",
    "DenseLinear": "linear",
    "describe": "doctor",
    "pack": "packing",
    "reference_path": "operators",
    "unpack": "packing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
