"""What users write themselves and name as FILE.py:NAME: methods and allocations. Imports no torch.

A file is only loaded where the user names it, and loading it runs its code. Its hash stands in the
record, so that a run is never resumed with other code.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from prunus.model.checkpoint.files import read_limited
from prunus.words import did_you_mean

#: A recipe names what was given in Python by this prefix and the name of the object.
GIVEN = "given:"


@dataclass(frozen=True)
class OwnCode:
    """The names of one option whose values may be a user's own code.

    Attributes:
        option: The name of the option.
        known: The values that prunus has itself.
        must: What NAME must be, such as "Method".
        path: The same for who looks it up, such as "a prunus.methods.Method".
        fits: Whether an object of a file is one.
    """

    option: str
    known: Collection[str]
    must: str
    path: str
    fits: Callable[[Any], bool]

    def check(self, value: str) -> None:
        """Check what can be checked of a name without loading a file.

        Args:
            value: A name that prunus has, FILE.py:NAME, or `GIVEN` and a name.

        Raises:
            ValueError: The name is none of these.
        """
        if value in self.known or value.startswith(GIVEN):
            return
        file, name = _split(value)
        if file.suffix != ".py":
            raise ValueError(
                f"the {self.option} {value!r} is unknown: choose one of {', '.join(self.known)}, "
                f"or name your own as FILE.py:NAME{did_you_mean(value, self.known)}"
            )
        if not name.isidentifier():
            raise ValueError(
                f"the {self.option} {value!r} names a file but no {self.option} in it: give "
                f"FILE.py:NAME, where NAME is {self.path} of the file"
            )

    def load_object(self, value: str) -> Any:
        """The user's own object of this name. The file that it names is loaded.

        Raises:
            ValueError: The name is unknown, the object was given in Python and is not in a file, or
                the file cannot be loaded or has no such object.
            FileNotFoundError: The file cannot be read.
        """
        self.check(value)
        if value.startswith(GIVEN):
            raise ValueError(
                f"the {self.option} {value.removeprefix(GIVEN)!r} was given in Python: give the "
                f"{self.must} again"
            )
        file, name = _split(value)
        module = _load_code(file.resolve(), _sha256(self.option, file), self.option)
        found = getattr(module, name, None)
        if not self.fits(found):
            # What the file imports is not the user's own; a Method has no `__name__`.
            own = [
                key
                for key, x in vars(module).items()
                if self.fits(x) and (not hasattr(x, "__name__") or x.__module__ == module.__name__)
            ]
            what = "has no" if found is None else f"has a {type(found).__name__}, not a {self.must}"
            raise ValueError(
                f"{file} {what}{'' if found is None else ', as'} {name}: its {self.option}s are "
                f"{', '.join(own) or 'none'}. Assign {self.path} to {name}{did_you_mean(name, own)}"
            )
        return found

    def sha256(self, value: str, given: Any = None) -> str | None:
        """The SHA-256 of a user's own code; None for what prunus has.

        Args:
            value: The name, see `check`.
            given: The function itself where it was given in Python. Its hash is None where its code
                is in no file.

        Raises:
            FileNotFoundError: The file cannot be read.
        """
        if given is not None:
            try:
                return hashlib.sha256(inspect.getsource(given).encode()).hexdigest()
            except (OSError, TypeError):
                return None  # A function that was typed at a prompt has no source.
        file = _split(value)[0]
        return _sha256(self.option, file) if file.suffix == ".py" else None


def _split(value: str) -> tuple[Path, str]:
    """File and name. A path on Windows has a colon too, so the last one separates them."""
    path, _, name = (value + ":" if value.endswith(".py") else value).rpartition(":")
    return Path(path).expanduser(), name


def _sha256(option: str, file: Path) -> str:
    """The hash of a file of code, or an error that says how to name one."""
    try:
        return hashlib.sha256(read_limited(file)).hexdigest()
    except OSError as fault:
        raise FileNotFoundError(
            f"the {option}'s file {file} cannot be read ({fault.strerror}): give FILE.py:NAME"
        ) from None


@functools.cache
def _load_code(file: Path, sha256: str, option: str) -> ModuleType:
    """The module of a file. A changed file has another hash and is loaded again."""
    module_name = f"prunus_own_{option}_{sha256[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as fault:
        del sys.modules[module_name]
        raise ValueError(
            f"the {option}'s file {file} cannot be loaded: {type(fault).__name__}: {fault}"
        ) from fault
    return module
