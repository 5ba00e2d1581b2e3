"""Make `from_pretrained` know packed checkpoints once prunus and transformers are both imported.

`import prunus` must be quick, and importing transformers takes seconds, so prunus does not import
it. If transformers is loaded already, the quantizer is registered at once. If not, an import hook
registers it right after transformers has loaded its table of quantizers.
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
    """Register the quantizer now, or when transformers is imported. A second call does nothing."""
    if _TABLE in sys.modules:
        _register_now()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register_now() -> None:
    from prunus.packed.quantizer import register_with_transformers

    register_with_transformers()


class _Waiting(MetaPathFinder):
    """Waits for the import of transformers' table and adds the registration after it.

    It removes itself at once, so that it cannot disturb later imports.
    """

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
    """Wraps a loader and registers the quantizer after it has run."""

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
