"""Pretend CUDA devices: torch without CUDA gets tensors whose device is `cuda:0`.

Their memory is the host's, and every operator runs on the processor. What torch refuses on a real
device is refused here too; `pretend_cuda.cpp` says how. So a run on a pretend device shows that
every tensor is where it must be. It shows nothing about speed.

`load` must come before the first import of torch, because torch looks for CUDA once, when it is
loaded. `install` then replaces the functions of `torch.cuda`. Both change the whole process, so
tests run in a process of their own; `pretend_cuda_plugin.py` arranges that.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).with_name("pretend_cuda.cpp")
#: The environment variable that is set in a process with pretend devices.
INSTALLED = "PRUNUS_PRETEND_CUDA"
#: The number of pretend devices. With two, a tensor on the wrong one of them is found as well.
DEVICES = 2
_BYTES = 8 * 2**30  # the memory that a pretend device claims to have
_CAPABILITY = (9, 0)


def why_not() -> str | None:
    """Why there can be no pretend device here, or None if there can be one."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    # torch itself is not imported.
    if (_torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "this torch is built with CUDA, and a pretend device needs one that is not"
    if sys.platform != "linux":
        return "the pretend device is built on Linux only"
    try:
        library()
    except RuntimeError as fault:
        return str(fault)
    return None


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    return Path(found.origin).parent


@cache
def library() -> Path:
    """The compiled library, in a temporary folder named after torch's version and the source.

    It holds no path of torch's, so environments with the same torch can share it, and one of them
    may be gone.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    version = importlib.metadata.version("torch")
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"prunus-pretend-cuda-{os.getuid()}"
    path = folder / f"{version}-{digest}.so"
    if path.exists():
        return path
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))), None)
    if compiler is None:
        raise RuntimeError("the pretend CUDA device needs a C++ compiler: no c++ or g++ is here")
    folder.mkdir(mode=0o700, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        # Of several processes that need the library one compiles it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(compiler, path)
    return path


def _compile(compiler: str, path: Path) -> None:
    torch, made = _torch_folder(), path.with_suffix(".new")
    done = subprocess.run(
        [
            *(compiler, "-O1", "-w", "-std=c++20", "-fPIC", "-shared", str(_SOURCE)),
            *("-o", str(made), f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"),
            *(f"-L{torch}/lib", "-ltorch_cpu", "-lc10"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        raise RuntimeError(
            f"the pretend CUDA device does not compile with this torch: "
            f"{lines[0] if lines else done.stderr[:200]}"
        )
    made.rename(path)


def load() -> None:
    """Load the library. Call this before torch is imported."""
    assert "torch" not in sys.modules, "torch looks for CUDA when it is imported: load earlier"
    _handle()


@cache
def _handle() -> ctypes.CDLL:
    # The library needs these two and does not know where they are, so they are loaded first.
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)
    loaded.pretend_operators.restype = ctypes.c_char_p
    for name in ("pretend_allocated", "pretend_peak"):
        getattr(loaded, name).restype = ctypes.c_int64
    loaded.pretend_set_device_count(DEVICES)
    return loaded


def install() -> None:
    """Make `torch.cuda` answer for the pretend devices. Call `load` before.

    Attention runs as a chain of matrix products on both kinds of devices here, so that the
    processor and a pretend device compute the same bits.
    """
    import torch

    handle = _handle()

    def index(device: Any = None) -> int:
        if device is None:
            return handle.pretend_current_device()
        found = torch.device(device).index if not isinstance(device, int) else device
        return handle.pretend_current_device() if found is None else found

    def set_device(device: Any) -> None:
        if not 0 <= index(device) < DEVICES:
            raise RuntimeError("CUDA error: invalid device ordinal")
        handle.pretend_set_device(index(device))

    def memory(device: Any = None) -> tuple[int, int]:
        return _BYTES - handle.pretend_allocated(index(device)), _BYTES

    @dataclass(frozen=True)
    class Properties:
        name: str = "pretend"
        major: int = _CAPABILITY[0]
        minor: int = _CAPABILITY[1]
        total_memory: int = _BYTES
        multi_processor_count: int = 1

    answers = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: DEVICES,
        "current_device": index,
        "set_device": set_device,
        "synchronize": lambda device=None: handle.pretend_synchronize(),
        "empty_cache": lambda: None,
        "mem_get_info": memory,
        "memory_allocated": lambda device=None: handle.pretend_allocated(index(device)),
        "max_memory_allocated": lambda device=None: handle.pretend_peak(index(device)),
        "reset_peak_memory_stats": lambda device=None: handle.pretend_reset_peak(index(device)),
        "get_device_name": lambda device=None: "pretend",
        "get_device_capability": lambda device=None: _CAPABILITY,
        "get_device_properties": lambda device=None: Properties(),
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    # A device trains in bfloat16. A processor does so only if it multiplies bfloat16 natively.
    torch.cpu._is_avx512_bf16_supported = lambda: True
    for kind in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    _mend_copies_of_storage(torch)
    _replace_nccl(torch.distributed)


def _mend_copies_of_storage(torch: Any) -> None:
    """Let storages on a pretend device be copied, as `copy.deepcopy` of a module needs."""
    clone = torch.UntypedStorage.clone

    def cloned(self: Any) -> Any:
        if self.device.type != "cuda":
            return clone(self)
        whole = torch.empty(0, dtype=torch.uint8, device=self.device).set_(self)
        return whole.clone().untyped_storage()

    torch.UntypedStorage.clone = cloned


def _replace_nccl(dist: Any) -> None:
    """Let process groups use a stand-in for NCCL; see `pretend_nccl.py`."""
    init = dist.init_process_group

    def init_process_group(backend: str, **options: Any) -> None:
        from pretend_nccl import NAME

        init(backend.replace("nccl", NAME), **options)

    dist.init_process_group = init_process_group


@dataclass
class Traffic:
    """What went over the bus, and how often the host waited, by the line of prunus.

    Attributes:
        uploads: bytes from host to device.
        downloads: bytes from device to host.
        pageable: of both, the bytes whose host memory was not pinned.
        waits: how often the host waited for the device.
        by_line: (kind, line of prunus) -> events and bytes, to say what changed. A copy from or to
            memory that is not pinned is of the kind "pageable upload" or "pageable download".
    """

    uploads: int = 0
    downloads: int = 0
    pageable: int = 0
    waits: int = 0
    by_line: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = sorted(self.by_line.items(), key=lambda row: -row[1][0])
        return "\n".join(f"{n:7} {size:12} {kind} {where}" for (kind, where), (n, size) in rows)


@contextlib.contextmanager
def traffic(least: int = 64) -> Iterator[Traffic]:
    """Count what goes over the bus while active.

    Args:
        least: copies of fewer bytes are not counted as bytes; they count as waits.
    """
    found, kinds = Traffic(), ("upload", "download", "wait")

    def listen(kind: int, name: bytes, size: int, pinned: int) -> None:
        if kinds[kind] == "wait":
            found.waits += 1
        elif size < least:
            return
        else:
            if kinds[kind] == "upload":
                found.uploads += size
            else:
                found.downloads += size
            found.pageable += 0 if pinned else size
        where = next(
            (
                f"{Path(frame.filename).name}:{frame.lineno} {name.decode()}"
                for frame in reversed(traceback.extract_stack())
                if "/prunus/" in frame.filename and "/src/" in frame.filename
            ),
            f"? {name.decode()}",
        )
        label = kinds[kind] if pinned or not size else f"pageable {kinds[kind]}"
        row = found.by_line.setdefault((label, where), [0, 0])
        row[0] += 1
        row[1] += size

    listener = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int)(
        listen
    )
    handle = _handle()
    handle.pretend_listen(listener)
    try:
        yield found
    finally:
        handle.pretend_listen(None)


def operators_without_cuda() -> list[str]:
    """The operators that ran on a pretend device and that a real device has no kernel for."""
    import torchgen
    import yaml

    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    known = {}
    for entry in yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        kinds = ",".join(entry.get("dispatch") or ["CompositeImplicitAutograd"])
        known["aten::" + entry["func"].split("(")[0]] = (
            "CUDA" in kinds or "Composite" in kinds or "structured_delegate" in entry
        )
    ran = _handle().pretend_operators().decode().split()
    return sorted(name for name in ran if name.startswith("aten::") and not known.get(name, False))
