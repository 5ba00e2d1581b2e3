"""Make transformers and peft know packed linears once torch and they are imported.

An installed prunus has an entry point in the group `torch.backends`, which torch calls when it is
imported, so that a program need not import prunus. `import prunus` calls `register` too: it is for
folders that are not installed, and where TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches torch's calls
off.

`import prunus` must be quick, and importing transformers takes seconds, so prunus does not import
it. If transformers is loaded already, the quantizer is registered at once. If not, an import hook
registers it right after transformers has loaded its table of quantizers. The same goes for the
configuration of peft's LoRA.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register() -> None:
    """Register what is loaded now, and the rest when it is imported. A second call does nothing."""
    for table, (later, action) in _ACTIONS.items():
        if table not in sys.modules:
            _wait(table, action)
        elif not _is_being_imported(table):
            action()
        elif table not in _followed:
            # Its own import has led to torch's, which called this. It is whole before this module:
            _wait(later, action)


def register_with_torch() -> None:
    """The entry point that torch calls: `register`, except that nothing can make it fail.

    An error would end the import of torch, also in programs that have nothing to do with prunus.
    """
    with contextlib.suppress(Exception):
        register()


def _is_being_imported(name: str) -> bool:
    spec = getattr(sys.modules[name], "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _wait(name: str, action: Callable[[], None]) -> None:
    if not any(getattr(finder, "table", None) == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name, action))


def _register_quantizer() -> None:
    from prunus.packed.quantizer import register_with_transformers

    register_with_transformers()


def _register_lora() -> None:
    """Let every LoRA configuration name the layer that peft puts around a packed linear.

    peft reads such layers from the configuration, which users make themselves.
    """
    config: Any = sys.modules[_LORA].LoraConfig
    made = config.__post_init__
    if getattr(made, "names_packed_linears", False):
        return

    @functools.wraps(made)
    def named(self: Any, *arguments: Any) -> None:
        from prunus.model.adapter import packed_lora_layer
        from prunus.packed.linear import PackedLinear

        made(self, *arguments)
        self._register_custom_module({PackedLinear: packed_lora_layer()})

    named.names_packed_linears = True  # type: ignore[attr-defined]
    config.__post_init__ = named


_LORA = "peft.tuners.lora.config"
#: Module of another library -> a module that is imported after it, and what to do once it is there.
_ACTIONS: dict[str, tuple[str, Callable[[], None]]] = {
    "transformers.quantizers.auto": ("transformers.modeling_utils", _register_quantizer),
    _LORA: ("peft.peft_model", _register_lora),
}
#: Modules that are being imported, and whose action follows.
_followed: set[str] = set()


class _Waiting(MetaPathFinder):
    """Waits for the import of a module and adds an action after it.

    It removes itself at once, so that it cannot disturb later imports.
    """

    def __init__(self, table: str, action: Callable[[], None]) -> None:
        self.table, self._action = table, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.table:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            # The loader of one module, in which only the method of this object is replaced.
            loader: Any = spec.loader
            loader.exec_module = functools.partial(_load, loader, self._action)
        return spec


def _load(loader: Any, action: Callable[[], None], module: ModuleType) -> None:
    """Load a module as its loader does, then do the action."""
    del loader.exec_module
    _followed.add(module.__name__)
    try:
        loader.exec_module(module)
    finally:
        _followed.discard(module.__name__)
    try:
        action()
    except Exception as fault:
        # The program may have nothing to do with packed checkpoints.
        warnings.warn(
            f"prunus could not add its packed format to {module.__name__}: {fault}. Packed "
            "checkpoints will not load; are the versions those that prunus asks for?",
            stacklevel=2,
        )
