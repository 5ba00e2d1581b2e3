"""A pretend CUDA device: tensors whose device is `cuda:0` and whose values are on the processor.

Every operator runs on the processor, after a check that all operands are on the device. So a run
shows that every tensor is where it must be, and nothing about speed. What a real device does with
delay happens here with delay too: a copy to pinned memory that does not block leaves NaN there
until the host waits, and a copy from pinned memory reads it when the device works next.

`install` changes torch for its whole process, before torch is first imported. So the tests marked
`cuda` run in a process of their own, which `tests/hardware/test_pretend_cuda.py` starts.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

#: The environment variable that is set in a process with the pretend device.
INSTALLED = "PRUNUS_PRETEND_CUDA"
_BYTES = 8 * 2**30  # the memory that the device claims to have

# What torch's core asks of a device before it lets tensors name it: one device, without streams.
_SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::DeviceIndex;
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at {
struct PretendHooks final : CUDAHooksInterface {
  explicit PretendHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, PretendHooks)
}
"""


def why_not() -> str | None:
    """Why there can be no pretend device here, or None if there can be one."""
    if (_torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "this torch is built with CUDA, and a pretend device needs one that is not"
    if sys.platform != "linux":
        return "the pretend device is built on Linux only"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "the pretend CUDA device needs a C++ compiler, and there is no c++"
    return None


def _torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def _library() -> Path:
    """The compiled source, in a temporary folder named after it and torch's version."""
    digest = hashlib.sha256(_SOURCE.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"prunus-pretend-cuda-{os.getuid()}"
    path = folder / f"{importlib.metadata.version('torch')}-{digest}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "c++"), "-w", "-std=c++20", "-fPIC", "-shared", "-xc++"]
        command += ["-", "-o", str(made), f"-I{_torch_folder()}/include"]
        subprocess.run(command, input=_SOURCE, text=True, check=True)
        made.rename(path)
    return path


def install() -> None:
    """Give torch the pretend device. Attention is a chain of products on both kinds of devices."""
    assert "torch" not in sys.modules, "torch looks for CUDA when it is imported: install earlier"
    libraries = [_torch_folder() / "lib" / name for name in ("libc10.so", "libtorch_cpu.so")]
    for path in (*libraries, _library()):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)

    import torch

    tensors = _tensor_type(torch)
    answers = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: tensors.wait(),
        "mem_get_info": lambda device=None: (_BYTES, _BYTES),
        "max_memory_allocated": lambda device=None: 1,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_device_name": lambda device=None: "pretend",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(name="pretend", major=9),
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
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
    # A parameter of the processor becomes one of the device by an exchange of two objects.
    torch.__future__.set_swap_module_params_on_conversion(True)


def _tensor_type(torch: Any) -> Any:
    """The class of tensors on the device, after torch makes them where it is asked for `cuda`."""
    aten = torch.ops.aten
    copies = (aten.copy_.default, aten._to_copy.default)
    # A real device takes indices from the host.
    indexing = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
    products = (aten.mm.default, aten.addmm.default, aten.bmm.default)
    # Address -> pinned memory, which is kept, so that no address has two meanings.
    pinned: dict[int, Any] = {}
    # Copies that were begun, and whether each goes to the device.
    begun: list[tuple[bool, Callable[[], Any]]] = []
    lock = threading.RLock()

    @cache
    def is_made_of_others(func: Any) -> bool:
        """In inference mode, torch leaves it to the dispatch to take such operators apart."""
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        name = func.name()
        return has_kernel(name, "CompositeImplicitAutograd") and not has_kernel(name, "CPU")

    def on_host(x: Any, given: list[Any]) -> Any:
        """An argument with the values of its tensors, which are added to `given`."""
        if isinstance(x, list | tuple):
            return [on_host(each, given) for each in x]
        if isinstance(x, torch.Tensor):
            given.append(x)
            return x.host if type(x) is PretendTensor else x
        return x

    class PretendTensor(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

        @staticmethod
        def __new__(cls, host: Any) -> Any:
            assert host.device.type == "cpu", host.device
            layout = (host.shape, host.stride(), host.storage_offset())
            made = torch.Tensor._make_wrapper_subclass(
                cls, *layout, dtype=host.dtype, device=torch.device("cuda:0")
            )
            made.host = host
            return made

        @property
        def data(self) -> Any:
            return self.detach()

        @data.setter
        def data(self, other: Any) -> None:
            torch.Tensor.data.__set__(self, other)
            self.host = other.host

        def __repr__(self) -> str:
            return f"on cuda:0: {self.host!r}"

        def tolist(self) -> Any:
            return self.cpu().tolist()

        @staticmethod
        def wait() -> None:
            """Do all copies that were begun. Only now may the host read what it has fetched."""
            with lock:
                for _, copy in begun:
                    copy()
                begun.clear()

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            kwargs = kwargs or {}
            if is_made_of_others(func):
                return func.decompose(*args, **kwargs)
            device = torch.device(kwargs.get("device") or "cuda")
            is_copy = func is aten.copy_.default
            down = type(args[0]) is not cls if is_copy else device.type != "cuda"
            if func is aten._local_scalar_dense.default or any(up for up, _ in begun):
                cls.wait()
            if is_copy and cls._is_delayed(down, *args):
                return args[0]
            if down:
                cls.wait()
            given: list[Any] = []
            hosts = [on_host(x, given) for x in args]
            options = {name: on_host(x, given) for name, x in kwargs.items()}
            if func not in copies:
                cls._check(func, given[:1] if func in indexing else given)
            if kwargs.get("device") and device.type == "cuda":
                options["device"] = torch.device("cpu")
            wrappers = {id(x.host): x for x in given if type(x) is cls}

            def wrapped(x: Any) -> Any:
                if isinstance(x, list | tuple):
                    return type(x)(map(wrapped, x))
                if not isinstance(x, torch.Tensor):
                    return x
                if id(x) not in wrappers:
                    return x if down else cls(x)
                assert wrappers[id(x)].shape == x.shape, f"{func} changes a shape"
                return wrappers[id(x)]

            return wrapped(func(*hosts, **options))

        @classmethod
        def _check(cls, func: Any, operands: list[Any]) -> None:
            for x in operands:
                # The value of a tensor without dimensions travels as a number.
                if type(x) is not cls and x.dim() and not x.is_meta:
                    raise RuntimeError(
                        "Expected all tensors to be on the same device, but found at least two "
                        f"devices, cuda:0 and {x.device} ({func} on a pretend device)"
                    )
            if func in products and not operands[0].is_floating_point():
                raise RuntimeError(f'"{func}" not implemented for integers on CUDA')

        @classmethod
        def kernel(cls, func: Any) -> Any:
            return lambda *args, **kwargs: cls.__torch_dispatch__(func, (), args, kwargs)

        @classmethod
        def _is_delayed(cls, down: bool, to: Any, source: Any, non_blocking: bool = False) -> bool:
            """Begin a copy, if it is one between the device and pinned memory that does not wait.

            The host converts dtypes, so that such a copy waits.
            """
            host = to if down else source
            if isinstance(host, cls) or not (non_blocking and host.is_pinned()):
                return False
            if to.dtype != source.dtype:
                return False
            if down:
                value = source.host.clone()
                to.untyped_storage().fill_(0xFF)  # NaN, for every dtype of floats
                begun.append((False, lambda: to.copy_(value)))
            else:
                begun.append((True, lambda: to.host.copy_(source)))
            return True

    def make(create: Any) -> Any:
        def made(*args: Any, device: Any = None, pin_memory: Any = None, **options: Any) -> Any:
            host = create(*args, device="cpu", **options)
            if "empty" in str(create):
                host.untyped_storage().fill_(0xFF)  # as on a real device, it holds anything
            return PretendTensor(host)

        return made

    names = "empty.memory_format empty_strided eye eye.m arange arange.start arange.start_step"
    library = PretendTensor.library = torch.library.Library("aten", "IMPL")
    for name in f"{names} zeros ones full randn scalar_tensor".split():
        create = getattr(aten, name.partition(".")[0])
        create = getattr(create, name.partition(".")[2] or "default")
        library.impl(name, make(create), "CUDA")
    # Without a kernel of the device, torch takes these apart and rounds otherwise. `torch.tensor`
    # copies past the dispatch to Python.
    whole = "copy_ silu_backward addr convolution convolution_backward native_layer_norm"
    whole += " native_layer_norm_backward native_group_norm native_group_norm_backward"
    for name in whole.split():
        library.impl(name, PretendTensor.kernel(getattr(aten, name).default), "CUDA")
    empty = torch.empty

    def empty_or_pinned(*size: Any, pin_memory: bool = False, **options: Any) -> Any:
        made = empty(*size, **options)
        if pin_memory:
            pinned[made.untyped_storage().data_ptr()] = made
        return made

    torch.empty = empty_or_pinned
    torch.Tensor.is_pinned = lambda self: (
        self.device.type == "cpu" and self.untyped_storage().data_ptr() in pinned
    )
    return PretendTensor
