"""The Python binding of the compiled kernels: find, open with ctypes, call on CPU tensors.

It knows pointers, dtypes and instruction sets; nothing of files, modules or models. `kernels.h` is
the C interface. Where the library was not built (no compiler at install time), `load` says why, and
the callers expand the weights in torch instead.

Shape suffixes: I input features, O output features.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.packed.weight import PackedWeight

__all__ = ["ISAS", "MAX_TOKENS", "MAX_TOKENS_AS_MATRIX", "Kernels", "load", "why_not"]

#: Instruction sets from slowest to fastest, as `kernels.h` numbers them.
ISAS = ("portable", "avx2", "avx512", "avx512-bf16", "amx")
#: Up to this many tokens every instruction set multiplies straight from the packed weight.
MAX_TOKENS = 16
#: Up to this many tokens, instruction sets with matrix products expand a few rows into the cache
#: and multiply them there. Beyond it, expanding the whole weight pays, because torch blocks its
#: product better.
MAX_TOKENS_AS_MATRIX = 1024
_ABI = 5
_BF16 = ISAS.index("avx512-bf16")  # the first with bfloat16 products
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3}
_BAD_ARGUMENT = 1
_FAULTS = {
    _BAD_ARGUMENT: "an argument is out of range",
    2: "this machine lacks the instruction set",
    3: "out of memory",
}


class _Weight(ctypes.Structure):
    """`PrunusWeight` of `kernels.h`, field by field."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("high_bytes", ctypes.c_void_p),
        ("rare_at", ctypes.c_void_p),
        ("rare_values", ctypes.c_void_p),
        ("rare", ctypes.c_int64),
        ("kind", ctypes.c_int),
    )


def _weight(packed: PackedWeight, offsets: torch.Tensor | None) -> _Weight:
    """Describe where a packed weight lies in memory.

    The result holds addresses only, so `packed` must outlive it.
    """
    (rows, in_features), values, mask, scales, coding = packed
    described = _Weight(
        rows,
        in_features,
        values.shape[0],
        None if mask is None else mask.data_ptr(),
        None if offsets is None else offsets.data_ptr(),
        values.data_ptr(),
        None if scales is None else scales.data_ptr(),
    )
    if coding is None:
        described.kind = _KINDS[values.dtype]
        return described
    codes, high_bytes, rare_at, rare = coding
    described.codes, described.high_bytes = codes.data_ptr(), high_bytes.data_ptr()
    described.rare_at, described.rare_values, described.rare = (
        rare_at.data_ptr(),
        rare.data_ptr(),
        rare.shape[0],
    )
    return described


def _check(fault: int) -> None:
    if fault:
        raise RuntimeError(f"the kernel refused: {_FAULTS[fault]}")


@dataclass(frozen=True, slots=True)
class Kernels:
    """An opened library and the instruction set that it uses.

    All methods take contiguous CPU tensors. The caller guarantees shapes and dtypes except where an
    error is listed, because these calls are made hundreds of times per generated token.

    Attributes:
        library: the opened library.
        path: its file.
        isa: index of the instruction set in `ISAS`.
        runtime: name of the OpenMP runtime that runs the loops; None where every call stays on the
            calling thread.
    """

    library: ctypes.CDLL
    path: Path
    isa: int
    runtime: str | None

    @property
    def isa_name(self) -> str:
        """The instruction set by name."""
        return ISAS[self.isa]

    def row_offsets(self, mask: torch.Tensor, in_features: int) -> torch.Tensor:
        """Return where the values of each row begin: int64 (O + 1); the last entry is their number.

        Args:
            mask: uint8 (O, ceil(I / 8)).
            in_features: I.

        Raises:
            ValueError: a bit beyond the last column is set.
        """
        offsets = torch.empty(mask.shape[0] + 1, dtype=torch.int64)
        count = self.library.prunus_row_offsets(
            mask.shape[0], in_features, mask.data_ptr(), offsets.data_ptr()
        )
        if count < 0:
            raise ValueError(f"the mask has bits set beyond its {in_features} columns")
        return offsets

    def linear(
        self,
        x: torch.Tensor,
        packed: PackedWeight,
        offsets: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return `x · Wᵀ + bias` (..., O) in the dtype of `x`, straight from the packed weight.

        Args:
            x: bfloat16, float16 or float32 (..., I), contiguous and not empty.
            packed: a weight that `bitmap.check` accepted.
            offsets: what `bitmap.check` returned.
            bias: (O,) in the dtype of `x`, or None.
        """
        return self._product(x, _weight(packed, offsets), bias)

    def _product(self, x: torch.Tensor, weight: _Weight, bias: torch.Tensor | None) -> torch.Tensor:
        shape = x.shape
        # torch parses separate numbers in half the time of a shape.
        out = torch.empty(*shape[:-1], weight.rows, dtype=x.dtype)
        fault = self.library.prunus_linear(
            self.isa,
            torch.get_num_threads(),
            ctypes.byref(weight),
            x.numel() // shape[-1],
            _KINDS[x.dtype],
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
        _check(fault)
        return out

    def max_tokens(self, weight_dtype: torch.dtype, x_dtype: torch.dtype) -> int:
        """Return the number of tokens up to which `linear` is the fastest way for these dtypes."""
        if self.isa >= _BF16 and x_dtype is torch.bfloat16 and weight_dtype is not torch.float16:
            return MAX_TOKENS_AS_MATRIX
        return MAX_TOKENS

    def expand(self, packed: PackedWeight, offsets: torch.Tensor | None, out: torch.Tensor) -> None:
        """Write the dense weight to `out` (O, I).

        `out` has the entries' dtype, or bfloat16 or float16 for int8 values.
        """
        fault = self.library.prunus_expand(
            self.isa,
            torch.get_num_threads(),
            ctypes.byref(_weight(packed, offsets)),
            _KINDS[out.dtype],
            out.data_ptr(),
        )
        _check(fault)

    def expand_rows(
        self,
        packed: PackedWeight,
        offsets: torch.Tensor | None,
        rows: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Write row `rows[i]` of the dense weight to row i of `out`.

        Args:
            packed, offsets: as for `linear`.
            rows: int64, contiguous.
            out: (number of rows, I); its dtype is as for `expand`.

        Raises:
            IndexError: a row number is out of range.
        """
        fault = self.library.prunus_expand_rows(
            self.isa,
            ctypes.byref(_weight(packed, offsets)),
            rows.data_ptr(),
            rows.numel(),
            _KINDS[out.dtype],
            out.data_ptr(),
        )
        if fault == _BAD_ARGUMENT:
            raise IndexError(f"there are {packed.shape[0]} rows, not all of {rows.tolist()}")
        _check(fault)

    @property
    def has_dense(self) -> bool:
        """Whether `dense_linear` can be called: it exists for AVX-512 with BF16 only."""
        return self.isa >= _BF16

    def dense_linear(
        self, x: torch.Tensor, weight_OI: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return `x · weight_OIᵀ + bias` (..., O), everything bfloat16; `x` is as for `linear`."""
        rows, in_features = weight_OI.shape
        weight = _Weight(rows, in_features, rows * in_features, None, None, weight_OI.data_ptr())
        return self._product(x, weight, bias)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, form: int
    ) -> torch.Tensor:
        """Return the RMS norm of `x` over its last dimension, in its dtype and shape.

        Args:
            x: bfloat16, float16 or float32 (..., I), contiguous and not empty.
            weight: (I,), contiguous, in the dtype of `x`.
            eps: added to the mean of squares.
            form: how the weight enters, as `prunus_rms_norm` numbers it.
        """
        out, width = torch.empty_like(x), weight.shape[0]
        fault = self.library.prunus_rms_norm(
            self.isa,
            _KINDS[x.dtype],
            form,
            x.numel() // width,
            width,
            x.data_ptr(),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
        )
        _check(fault)
        return out

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rotary embedding of one token, in the form that splits heads into halves.

        Args:
            query: bfloat16, float16 or float32 (1, heads, 1, D), contiguous; D is even.
            key: (1, key heads, 1, D), likewise.
            cos, sin: D numbers each, likewise.
        """
        out, out_key = torch.empty_like(query), torch.empty_like(key)
        fault = self.library.prunus_rotate(
            self.isa,
            _KINDS[query.dtype],
            query.shape[1],
            key.shape[1],
            query.shape[3],
            query.data_ptr(),
            key.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
            out_key.data_ptr(),
        )
        _check(fault)
        return out, out_key

    def read(self, data: torch.Tensor) -> int:
        """Sum the bytes of `data` as 64-bit words, in whole pieces of 64 KiB.

        It runs as fast as memory can be read, which makes it a measure of the bandwidth.
        """
        return int(
            self.library.prunus_read(
                torch.get_num_threads(), data.data_ptr(), data.numel() * data.element_size()
            )
        )


def load(isa: str | None = None) -> Kernels | None:
    """Open the kernels, or return None where there are none (`why_not` gives the reason).

    Args:
        isa: one of `ISAS`. By default it is the best of this machine, or what the environment
            variable PRUNUS_ISA names (`off` switches the kernels off).

    Raises:
        ValueError: there is no such instruction set, or this machine does not have it.
    """
    return _load(isa or os.environ.get("PRUNUS_ISA") or "best")[0]


def why_not() -> str | None:
    """Return why `load` returns None, or None where it does not."""
    return _load(os.environ.get("PRUNUS_ISA") or "best")[1]


@functools.cache
def _load(isa: str) -> tuple[Kernels | None, str | None]:
    if isa == "off":
        return None, "switched off by PRUNUS_ISA=off"
    if isa not in (*ISAS, "best"):
        raise ValueError(
            f"there is no instruction set {isa!r}; PRUNUS_ISA may be one of {', '.join(ISAS)}, off"
        )
    found = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not found:
        return (
            None,
            "they were not compiled when prunus was installed: install a C++17 compiler and "
            "reinstall",
        )
    try:
        library = ctypes.CDLL(str(found[0]))
        abi = library.prunus_abi()
    except (OSError, AttributeError) as fault:
        return None, f"{found[0].name} cannot be opened: {fault}"
    if abi != _ABI:
        return None, f"{found[0].name} was built from another version of prunus: reinstall"
    _declare(library)
    best = library.prunus_best_isa()
    chosen = best if isa == "best" else ISAS.index(isa)
    if chosen > best:
        raise ValueError(f"this machine has no {isa}; its best instruction set is {ISAS[best]}")
    parallel = _torch_runtime()
    if parallel is not None:
        library.prunus_set_runtime(ctypes.cast(parallel, ctypes.c_void_p))
    runtime = None if parallel is None else "GOMP_parallel of torch's OpenMP library"
    return Kernels(library, found[0], chosen, runtime), None


def _torch_runtime() -> Any:
    """Return the entry point of the OpenMP library that torch loaded into this process, or None.

    The wheels of torch ship a libgomp of their own. Linking against one at build time could load a
    second one, whose threads would compete with torch's for the cores; so the loaded one is looked
    up. LLVM's and Intel's libraries on Linux have the same entry point.
    """
    for name in (None, "libgomp.so.1"):
        try:
            mode = ctypes.DEFAULT_MODE if name is None else ctypes.DEFAULT_MODE | os.RTLD_NOLOAD
            return ctypes.CDLL(name, mode=mode).GOMP_parallel
        except (OSError, AttributeError):
            continue
    return None


def _declare(library: ctypes.CDLL) -> None:
    pointer, length, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.prunus_set_runtime.argtypes = [pointer]
    library.prunus_set_runtime.restype = None
    library.prunus_row_offsets.argtypes = [length, length, pointer, pointer]
    library.prunus_row_offsets.restype = length
    weight = ctypes.POINTER(_Weight)
    library.prunus_linear.argtypes = [number, number, weight, length, number, *[pointer] * 3]
    library.prunus_expand.argtypes = [number, number, weight, number, pointer]
    library.prunus_expand_rows.argtypes = [number, weight, pointer, length, number, pointer]
    real = ctypes.c_float
    library.prunus_rms_norm.argtypes = [
        *[number] * 3,
        length,
        length,
        *[pointer] * 2,
        real,
        pointer,
    ]
    library.prunus_rotate.argtypes = [number, number, length, length, length, *[pointer] * 6]
    library.prunus_read.argtypes = [number, pointer, length]
    library.prunus_read.restype = ctypes.c_uint64
