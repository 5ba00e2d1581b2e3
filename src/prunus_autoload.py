"""Make transformers and peft know packed linears, whoever imports them, and never disturb others.

An installed prunus has an entry point in the group `torch.backends`, which torch calls when it is
imported. So a program loads packed checkpoints without importing prunus. `import prunus` calls
`register` too, for folders that are not installed and where TORCH_DEVICE_BACKEND_AUTOLOAD=0
switches the calls of torch off.

Every program that imports torch imports this module. It is not part of the package and imports
nothing of it, so a broken prunus cannot end an import of torch. It waits until transformers has
loaded its table of quantizers, or peft its configuration of LoRA. Only then it imports prunus, and
a failure becomes one warning.
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
            _attempt(action)
        elif table not in _followed:
            # Its own import has led to torch's, which called this. It is whole before this module:
            _wait(later, action)


def register_with_torch() -> None:
    """The entry point that torch calls. An error in it would end the import of torch."""
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
_has_warned = False


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
    _attempt(action)


def _attempt(action: Callable[[], None]) -> None:
    """Do an action of prunus. A failure becomes a warning, once.

    The program may have nothing to do with packed checkpoints, and may turn warnings into errors.
    """
    global _has_warned  # noqa: PLW0603 (one flag of the process)
    try:
        action()
    except Exception as fault:
        if not _has_warned:
            _has_warned = True
            with contextlib.suppress(Warning):
                warnings.warn(
                    f"prunus is installed, and cannot be used: {fault}. Packed checkpoints will "
                    "not load. Install prunus again, with the versions that it asks for.",
                    stacklevel=2,
                )
