"""Make transformers know packed checkpoints, whoever imports it, and never disturb others.

An installed prunus has an entry point in the group `torch.backends`, which torch calls when it is
imported. So a program loads packed checkpoints without importing prunus. `import prunus` calls
`register` too, for folders that are not installed and where TORCH_DEVICE_BACKEND_AUTOLOAD=0
switches the calls of torch off.

Every program that imports torch imports this module. It is not part of the package and imports
nothing of it, so a broken prunus cannot end an import of torch. It waits until transformers has
loaded its table of quantizers. Only then it imports prunus, and a failure becomes one warning.
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
    """Let transformers load packed checkpoints, at once or as soon as it is imported.

    It waits for a later module if the table of quantizers is just being imported, and its import
    has led to this call. A second call does nothing, and a failure becomes a warning.
    """
    name = "transformers.quantizers.auto"
    if name not in sys.modules:
        _wait(name, _register)
    elif not _is_being_imported(name):
        _attempt(_register)
    elif name not in _followed:
        # Its own import has led to torch's, which called this. It is whole before this module:
        _wait("transformers.modeling_utils", _register)


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


def _register() -> None:
    from prunus.runtime.quantizer import register_with_transformers

    register_with_transformers()


#: Modules that are being imported, and whose action follows.
_followed: set[str] = set()


class _Waiting(MetaPathFinder):
    """Waits for the import of a module and adds an action after it.

    It removes itself at once, so that it cannot disturb later imports.

    Attributes:
        table: The full name of the module, by which `_wait` finds out that somebody waits already.
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
            # Replace `exec_module` on this loader alone: it belongs to one module, and its class,
            # which other modules share, stays as it is.
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
    """Do an action of prunus. A failure becomes a warning.

    The program may have nothing to do with packed checkpoints, and may turn warnings into errors.
    """
    try:
        action()
    except Exception as fault:
        with contextlib.suppress(Warning):
            warnings.warn(
                f"prunus is installed, and cannot be used: {fault}. Packed checkpoints will not "
                "load. Install prunus again, with the versions that it asks for.",
                stacklevel=2,
            )
