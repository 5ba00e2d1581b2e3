"""Sizes of memory and files as people write them."""

from __future__ import annotations

import re

_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*$", re.IGNORECASE)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str, kilo: int = 1024) -> int:
    """The bytes of a size such as '8GB', '512MB' or '100000'.

    Args:
        text: A number with a unit. The case of letters does not matter.
        kilo: 1024 for memory, or 1000 for files, as in `in_bytes`: a MB is kilo². A unit with an i,
            such as MiB, is a power of 1024 in both.

    Raises:
        ValueError: The text is not a size, or a small number without a unit, or the size is 0 or
            larger than any computer has.

    >>> parse_bytes("1.5GiB"), parse_bytes("900MB", 1000)
    (1610612736, 900000000)
    """
    what = "a memory size" if kilo == 1024 else "the size of a file"
    match = _BYTES.match(text)
    # No model and no memory has so few bytes: a small number without a unit is a slip.
    if not match or (not match[2] and 0 < float(match[1]) < 10_000):
        hint = (
            f"; did you mean {match[1]}{'GB' if float(match[1]) < 16 else 'MB'}?" if match else ""
        )
        raise ValueError(f"{what} looks like 8GB, 512MB or 1.5GiB; got {text[:80]!r}{hint}")
    unit = match[2].upper().removesuffix("B")
    number = float(match[1]) * (1024 if "I" in unit else kilo) ** _UNITS[unit.removesuffix("I")]
    if number >= 2**63:
        raise ValueError(f"no computer has this much memory: {text[:40]!r}; give a smaller size")
    value = int(number)
    if value < 1:
        raise ValueError(f"{what} must be larger than zero, such as 8GB or 512MB; got {text!r}")
    return value


def counted(count: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "window"), counted(2, "window")
    ('1 window', '2 windows')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def in_bytes(count: int) -> str:
    """A number of bytes for people. All units are powers of 1000, as those of files.

    >>> in_bytes(56_623_104), in_bytes(2_500)
    ('56.6 MB', '2.5 kB')
    """
    unit, size = next((x for x in (("GB", 1e9), ("MB", 1e6)) if count >= x[1]), ("kB", 1e3))
    return f"{count / size:.1f} {unit}"
