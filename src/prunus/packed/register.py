"""Makes `from_pretrained` know packed checkpoints as soon as both prunus and transformers are imported.

`import prunus` must stay quick, and transformers takes seconds: so prunus does not import it. If transformers
is there, the quantizer is registered at once; if not, right after it has loaded its table of quantizers.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register"]

_TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Register the quantizer now, or when transformers is imported. Calling it again does nothing."""
    if _TABLE in sys.modules:
        _register_now()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register_now() -> None:
    from prunus.packed.quantizer import register_with_transformers

    register_with_transformers()


class _Waiting(MetaPathFinder):
    """Sees the import of transformers' table, steps aside, and has the quantizer registered after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Another loader, with one step after it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register_now()
