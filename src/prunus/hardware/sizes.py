"""Sizes of memory as people write them."""

from __future__ import annotations

import re

__all__ = ["parse_bytes"]

_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*$", re.IGNORECASE)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """A size such as '8GB', '512MB', '1.5GiB' or '100000' in bytes; units are powers of 1024.

    Raises:
        ValueError: not a size, or zero.
    """
    match = _BYTES.match(text)
    if not match:
        raise ValueError(f"a memory size looks like 8GB, 512MB or 1.5GiB; got {text!r}")
    value = int(float(match[1]) * 1024 ** _UNITS[match[2].upper().rstrip("B").rstrip("I")])
    if value < 1:
        raise ValueError(f"a memory size must be larger than zero; got {text!r}")
    return value
