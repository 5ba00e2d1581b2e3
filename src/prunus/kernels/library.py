"""The compiled kernels: find the library, open it with ctypes, and call its functions.

`kernels.h` is the C interface. Where the library was not built (no compiler at install time),
`why_not` says why, and the callers compute in torch instead, with the same result but for rounding.
torch is imported when a kernel is called: `prunus --version` opens the library without it.

Shape suffixes: T tokens, I inputs (features).
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: The version of `kernels.h` that the Python code describes.
ABI = 13
# What the numbers mean that the functions return.
_FAULTS = {
    1: "an argument is out of range",
    2: "this machine lacks the instruction set",
    3: "out of memory",
}
# Whether this is a processor of the x86-64 kind. Any other has the portable code alone.
_X86 = platform.machine() == "x86_64"
#: Instruction sets of this kind of processor, slowest to fastest, as `kernels.h` numbers them.
ISAS = ("portable", *(("avx2", "avx512", "avx512-bf16", "amx") if _X86 else ()))


@dataclass(frozen=True, slots=True)
class Library:
    """An opened library and the instruction set that it uses.

    Attributes:
        library: The library.
        isa: Index of the instruction set in `ISAS`.
    """

    library: ctypes.CDLL
    isa: int

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
        """Call a function of `kernels.h` on all threads of torch.

        Args:
            name: The name of the function.
            *arguments: Its arguments after the instruction set and the number of threads. A tensor
                becomes its address, so it must be contiguous; None becomes a null pointer.

        Raises:
            RuntimeError: The function refused to work; the message says why.
        """
        import torch

        _use_threads_of_torch(self.library)
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        fault = getattr(self.library, name)(self.isa, torch.get_num_threads(), *values)
        if fault:
            raise RuntimeError(f"the kernel refused: {_FAULTS[fault]}")


def load_kernels(isa: str | None = None) -> Library | None:
    """Open the kernels, or return None where there are none (`why_not` gives the reason).

    Args:
        isa: One of `ISAS`. By default it is the best of this machine, or what the environment
            variable PRUNUS_ISA names (`off` switches the kernels off).

    Raises:
        ValueError: There is no such instruction set, or this machine lacks it.
    """
    return _load_library(isa or os.environ.get("PRUNUS_ISA") or "best")[0]


def why_not() -> str | None:
    """Return why `load_kernels` returns None, as part of a sentence; None where there is a library.

    Raises:
        ValueError: As `load_kernels`.
    """
    return _load_library(os.environ.get("PRUNUS_ISA") or "best")[1]


def missing_words() -> str | None:
    """What a run that would use the kernels says once where there are none; None where they are.

    A user who switched them off by PRUNUS_ISA=off knows it.
    """
    reason = None if os.environ.get("PRUNUS_ISA") == "off" else why_not()
    return reason and f"prunus runs without its compiled kernels, and may take longer: {reason}"


@functools.cache
def _load_library(isa: str) -> tuple[Library | None, str | None]:
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
    library.prunus_find_codewords.argtypes = [number, number, *(length,) * 4, *(pointer,) * 5]
    for function in (library.prunus_pack_codewords, library.prunus_unpack_codewords):
        function.argtypes = [number, number, *(length,) * 6, *(pointer,) * 5]
    best = library.prunus_best_isa()
    chosen = best if isa == "best" else ISAS.index(isa)
    if chosen > best:
        raise ValueError(f"this machine has no {isa}; its best instruction set is {ISAS[best]}")
    return Library(library, chosen), None


@functools.cache
def _use_threads_of_torch(library: ctypes.CDLL) -> bool:
    """Let the kernels run on the OpenMP library that torch loaded; False if there is none.

    The wheels of torch ship a libgomp of their own. Linking against one at build time could load a
    second one, whose threads would compete with torch's for the cores; so the loaded one is looked
    up. LLVM's and Intel's libraries on Linux have the same entry point.
    """
    for name in (None, "libgomp.so.1"):
        try:
            # RTLD_NOLOAD opens the library only if the process has loaded it already.
            mode = ctypes.DEFAULT_MODE if name is None else ctypes.DEFAULT_MODE | os.RTLD_NOLOAD
            parallel = ctypes.CDLL(name, mode=mode).GOMP_parallel
        except (OSError, AttributeError):
            continue
        library.prunus_set_runtime(ctypes.cast(parallel, ctypes.c_void_p))
        return True
    return False
