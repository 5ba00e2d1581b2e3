"""Options as TOML: how a file is read, with errors for people, and written. Imports no torch."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.model.checkpoint.regular_files import read_limited

_MAX_BYTES = 2**18  # of a TOML file
#: A key of more than sixteen parts. Python's parser takes time and memory of the square of them.
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?>[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){16}""")


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The content of a TOML file."""
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


def to_toml(values: Mapping[str, Any]) -> str:
    """Values by name as TOML. Those that are None are left out, because TOML has no such value."""
    return "".join(f"{key} = {_value(each)}\n" for key, each in values.items() if each is not None)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON and TOML escape equally, except for DEL, which only TOML escapes.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return repr(value)
