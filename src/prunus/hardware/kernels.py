"""The compiled kernels: find the library, open it with ctypes, and multiply inputs with it.

`runtime/kernels/kernels.h` is the C interface. Here is what needs tensors alone; what needs packed
weights is in `prunus.runtime.kernels.library`. Where the library was not built (no compiler at
install time), `why_not` says why, and the callers compute in torch instead.

Shape suffixes: T tokens, I inputs (features).
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: The version of `kernels.h` that the Python code describes.
ABI = 11
#: What a function returns when an argument is out of range; callers may expect it.
BAD_ARGUMENT = 1
# What the numbers mean that the functions return.
_FAULTS = {
    BAD_ARGUMENT: "an argument is out of range",
    2: "this machine lacks the instruction set",
    3: "out of memory",
}
# Whether this is a 64-bit Arm processor, which has other instruction sets than x86-64.
_ARM = platform.machine() in {"aarch64", "arm64"}
#: Instruction sets of this kind of processor, slowest to fastest, as `kernels.h` numbers them.
ISAS = (
    ("portable", "neon", "neon-dotprod")
    if _ARM
    else ("portable", "avx2", "avx512", "avx512-bf16", "amx")
)


def check_fault(fault: int) -> None:
    """Raise what the result of a function says, if it is not 0.

    Raises:
        RuntimeError: The function refused to work; the message says why.
    """
    if fault:
        raise RuntimeError(f"the kernel refused: {_FAULTS[fault]}")


@dataclass(frozen=True, slots=True)
class Library:
    """An opened library and the instruction set that it uses.

    Attributes:
        library: The library.
        path: Its file.
        isa: Index of the instruction set in `ISAS`.
        runtime: What runs the loops on all threads; None where every call stays on the thread that
            makes it.
    """

    library: ctypes.CDLL
    path: Path
    isa: int
    runtime: str | None

    @property
    def has_bfloat16(self) -> bool:
        """Whether it multiplies bfloat16 natively, which `add_gram` needs."""
        return ISAS[self.isa] in ("avx512-bf16", "amx")

    def add_gram(self, gram_II: torch.Tensor, X_TI: torch.Tensor) -> None:
        """Add XᵀX to a matrix in place.

        Products are exact. Sums are in float32, over 512 tokens at a time.

        Args:
            gram_II: float32, contiguous and symmetric, on the CPU.
            X_TI: bfloat16, on the CPU.

        Raises:
            RuntimeError: This processor does not multiply bfloat16 natively, see `has_bfloat16`.
        """
        self.call("prunus_add_gram", *X_TI.shape, X_TI.contiguous(), gram_II)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of `kernels.h` on all threads.

        Args:
            name: The name of the function.
            *arguments: Its arguments after the instruction set and the number of threads. A tensor
                becomes its address, so it must be contiguous; None becomes a null pointer.

        Raises:
            RuntimeError: The function refused to work.
        """
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        check_fault(getattr(self.library, name)(self.isa, torch.get_num_threads(), *values))


def load(isa: str | None = None) -> Library | None:
    """Open the kernels, or return None where there are none (`why_not` gives the reason).

    Args:
        isa: One of `ISAS`. By default it is the best of this machine, or what the environment
            variable PRUNUS_ISA names (`off` switches the kernels off).

    Raises:
        ValueError: There is no such instruction set, or this machine lacks it.
    """
    return _load(isa or os.environ.get("PRUNUS_ISA") or "best")[0]


def why_not() -> str | None:
    """Return why `load` returns None, as part of a sentence; None where there is a library.

    Raises:
        ValueError: As `load`.
    """
    return _load(os.environ.get("PRUNUS_ISA") or "best")[1]


@functools.cache
def _load(isa: str) -> tuple[Library | None, str | None]:
    """The library, or why there is none; the other one of the two is None."""
    if isa == "off":
        return None, "switched off by PRUNUS_ISA=off"
    if isa not in (*ISAS, "best"):
        raise ValueError(
            f"there is no instruction set {isa!r}; PRUNUS_ISA may be one of {', '.join(ISAS)}, off"
        )
    files = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not files:
        reason = "they were not compiled when prunus was installed"
        return None, f"{reason}: install a C++17 compiler and reinstall"
    try:
        library = ctypes.CDLL(str(files[0]))
        abi = library.prunus_abi()
    except (OSError, AttributeError) as fault:
        return None, f"{files[0].name} cannot be opened: {fault}"
    if abi != ABI:
        return None, f"{files[0].name} was built from another version of prunus: reinstall"
    number, length, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.prunus_set_runtime.argtypes = [pointer]
    library.prunus_set_runtime.restype = None
    library.prunus_add_gram.argtypes = [number, number, length, length, pointer, pointer]
    sizes = (number, number, length, length, ctypes.c_float)
    library.prunus_round_columns.argtypes = [*sizes, *(pointer,) * 7]
    library.prunus_find_codewords.argtypes = [number, number, *(length,) * 4, *(pointer,) * 5]
    best = library.prunus_best_isa()
    chosen = best if isa == "best" else ISAS.index(isa)
    if chosen > best:
        raise ValueError(f"this machine has no {isa}; its best instruction set is {ISAS[best]}")
    parallel = _torch_runtime()
    if parallel is not None:
        library.prunus_set_runtime(ctypes.cast(parallel, ctypes.c_void_p))
    runtime = None if parallel is None else "GOMP_parallel of torch's OpenMP library"
    return Library(library, files[0], chosen, runtime), None


def _torch_runtime() -> Any:
    """Return the entry point of the OpenMP library that torch loaded into this process, or None.

    The wheels of torch ship a libgomp of their own. Linking against one at build time could load a
    second one, whose threads would compete with torch's for the cores; so the loaded one is looked
    up. LLVM's and Intel's libraries on Linux have the same entry point.
    """
    for name in (None, "libgomp.so.1"):
        try:
            # RTLD_NOLOAD opens the library only if the process has loaded it already.
            mode = ctypes.DEFAULT_MODE if name is None else ctypes.DEFAULT_MODE | os.RTLD_NOLOAD
            return ctypes.CDLL(name, mode=mode).GOMP_parallel
        except (OSError, AttributeError):
            continue
    return None
