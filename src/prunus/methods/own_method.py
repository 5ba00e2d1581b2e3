"""A method by its name: one of the table, or a user's own in a Python file. Imports no torch.

A file is only loaded where the user names it. Records hold its path and its SHA-256.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path

from prunus.methods.table import METHODS, Method

#: A recipe names a `Method` that was given in Python by this prefix and the method's own name.
GIVEN = "given:"


def check_method_name(method: str) -> None:
    """Check what can be checked of a method's name without loading a file.

    >>> check_method_name("wandb")
    Traceback (most recent call last):
    ValueError: the method 'wandb' is unknown: choose one of magnitude, wanda, wanda-variant, ria, \
sparsegpt, obs, alps, or name your own as FILE.py:NAME
    """
    if method in METHODS or method.startswith(GIVEN):
        return
    file, name = _split(method)
    if file.suffix != ".py":
        raise ValueError(
            f"the method {method!r} is unknown: choose one of {', '.join(METHODS)}, or name your "
            "own as FILE.py:NAME"
        )
    if not name.isidentifier():
        raise ValueError(
            f"the method {method!r} names a file but no method in it: give FILE.py:NAME, where "
            "NAME is a prunus.methods.Method of the file"
        )


def get_method(method: str) -> Method:
    """The method of this name. A file that it names is loaded, which runs its code.

    Raises:
        ValueError: there is no such method, or its file cannot be loaded.
        FileNotFoundError: there is no such file.

    >>> get_method("wanda").needs
    'norms'
    """
    check_method_name(method)
    if method in METHODS:
        return METHODS[method]
    if method.startswith(GIVEN):
        raise ValueError(
            f"the method {method.removeprefix(GIVEN)!r} was given in Python: give the Method again"
        )
    file, name = _split(method)
    return _load(file.resolve(), name, _sha256(file))


def method_sha256(method: str, given: Method | None = None) -> str | None:
    """The SHA-256 of the code of a user's own method; None for the methods of the table."""
    if given is not None:
        try:
            return hashlib.sha256(inspect.getsource(given.function).encode()).hexdigest()  # type: ignore[arg-type]
        except (OSError, TypeError):
            return None  # Nothing is known of a function without a file.
    file = _split(method)[0]
    return _sha256(file) if file.suffix == ".py" else None


def _split(method: str) -> tuple[Path, str]:
    """File and name. A path on Windows has a colon too, so the last one separates them."""
    path, _, name = (method + ":" * method.endswith(".py")).rpartition(":")
    return Path(path).expanduser(), name


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as fault:
        raise FileNotFoundError(
            f"the method's file {file} cannot be read ({fault.strerror}): give FILE.py:NAME"
        ) from None


@functools.cache
def _load(file: Path, name: str, sha256: str) -> Method:
    """The method `name` of a file. A file that has changed is loaded again."""
    module_name = f"prunus_own_method_{sha256[:16]}"
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
            f"the method's file {file} cannot be loaded: {type(fault).__name__}: {fault}"
        ) from fault
    found = getattr(module, name, None)
    if not isinstance(found, Method):
        there = [key for key, each in vars(module).items() if isinstance(each, Method)]
        what = "has no" if found is None else f"has a {type(found).__name__}, not a Method, as"
        raise ValueError(
            f"{file} {what} {name}: its methods are {', '.join(there) or 'none'}. Assign a "
            f"prunus.methods.Method to {name}"
        )
    return found
