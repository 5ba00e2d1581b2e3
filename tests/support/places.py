"""Where things are: the repository, and the scripts that tests start as processes of their own."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

SUPPORT = Path(__file__).resolve().parent
REPOSITORY = SUPPORT.parent.parent


def import_benchmark(name: str) -> ModuleType:
    """The module `benchmarks/<name>.py`, which is a script and in no package."""
    path = REPOSITORY / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
