"""Reads a recipe from a TOML file and from options, with errors for people. Free of torch."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prunus.model.checkpoint.regular_files import read_limited
from prunus.pruning.recipe import Recipe

__all__ = ["load_recipe", "read_toml"]

_MAX_BYTES = 2**18  # of a TOML file
#: A key of more than sixteen parts. Python's parser takes time and memory of the square of them.
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?>[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){16}""")


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The content of a TOML file.

    Args:
        path: of the file.
        what: what the file is, for messages, such as "recipe".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, larger than 256 KiB, or has keys of more than sixteen parts.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(
                f"{what} {path} has {path.stat().st_size:,} bytes, and at most {_MAX_BYTES:,} are "
                "read; is it the right file?"
            )
        text = read_limited(path).decode("utf-8")
        if found := _LONG_KEY.search(text):
            raise ValueError(
                f"{what} {path} has a key of more than sixteen parts: {found[0][:40]}…; is it the "
                "right file?"
            )
        return tomllib.loads(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {what} {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise ValueError(f"{what} {path} is not valid TOML: {fault}") from fault


def load_recipe(path: Path | None, overrides: dict[str, Any]) -> Recipe:
    """Read a recipe file, or take the defaults, and put `overrides` on top.

    Args:
        path: a TOML file, or None.
        overrides: options by name; a value of None does not override.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not TOML, or it has an unknown key or a value out of range; the
            message names the key.

    >>> load_recipe(None, {"sparsity": 0.6, "seed": None}).sparsity
    0.6
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = read_toml(path, "recipe file")
    values.update({key: value for key, value in overrides.items() if value is not None})
    try:
        return Recipe(**values)
    except ValidationError as fault:
        where = f"recipe {path}: " if path is not None else ""
        faults = [_explain(error) for error in fault.errors()]
        more = [f"and {len(faults) - 4} more"] if len(faults) > 4 else []
        raise ValueError(where + "; ".join(faults[:4] + more)) from None


def _explain(error: Any) -> str:
    """One of pydantic's errors in the words of the command line."""
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown option {name!r}; known are {', '.join(Recipe.model_fields)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    return f"{name}: {message.lower()} (got {_brief(error['input'])})"


def _brief(value: Any) -> str:
    """A value as an error shows it: as it is if it is short, otherwise what it is.

    >>> _brief("2:5"), _brief(list(range(1000)))
    ("'2:5'", 'a list')
    """
    if hasattr(value, "shape"):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 200 else f"a {type(value).__name__}"
