"""Words for people: what an error says in one line, and sizes as people write them."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import importlib.util
import math
import re
from collections.abc import Iterable, Iterator, Sequence

#: Errors whose message says enough without the name of their type.
_CLEAR = (OSError, ValueError, NotImplementedError, ImportError, MemoryError)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """A `with` block whose ValueErrors say which tensor, linear or text they are about."""
    try:
        yield
    except ValueError as fault:
        raise ValueError(f"{name}: {fault}") from fault


def reason(error: BaseException, most: int = 300) -> str:
    """The message of an error in one line: without the number of a system error, cut at a word.

    The name of the type comes first unless the message says enough without it.

    Args:
        error: The error.
        most: The most characters of the message; a longer one is cut and ends with "…".

    >>> reason(FileNotFoundError(2, "No such file or directory", "gone.txt"))
    'gone.txt: No such file or directory'
    >>> reason(KeyError("bits")), reason(ValueError("one two three"), most=9)
    ("KeyError: 'bits'", 'one two …')
    >>> reason(RecursionError("maximum recursion depth exceeded"))
    'brackets are nested too deep'
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, RecursionError):  # Python's own words are about its stack
        text = "brackets are nested too deep"
    elif not isinstance(error, _CLEAR) or not text:
        text = f"{type(error).__name__}: {text or 'no message'}"
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most].rsplit(" ", 1)[0] + " …"


def name_patterns(names: Iterable[str]) -> list[str]:
    """Names with N for each number, every one once.

    >>> name_patterns(["mtp.0.fc.weight", "mtp.1.fc.weight"])
    ['mtp.N.fc.weight']
    """
    return sorted({re.sub(r"\d+", "N", name) for name in names})


def did_you_mean(wrong: object, choices: Iterable[str], what: str = "") -> str:
    """A hint for a misspelt name: the most similar of `choices`, or "" if none is similar.

    Messages that end with it list all choices before; `known` lists them only where none is
    similar. `what` says what is meant.

    >>> did_you_mean("balence", ["fast", "balanced"]), did_you_mean("x", ["fast", "balanced"])
    ('; did you mean balanced?', '')
    """
    # Upper and lower case are one for the similarity, as in Q4K and q4_k.
    names = {name.lower(): name for name in choices}
    near = difflib.get_close_matches(str(wrong).lower(), names, n=1)
    return f"; did you mean {what}{names[near[0]]}?" if near else ""


def known(wrong: object, choices: Iterable[str]) -> str:
    """What follows an unknown name: the most similar of `choices`, or all if none is similar.

    >>> known("share_", ["gear", "share"]), known("wheels", ["gear", "share"])
    ('; did you mean share?', '; known are gear, share')
    """
    return did_you_mean(wrong, choices) or f"; known are {', '.join(choices)}"


def nearest_glob(glob: str, names: Sequence[str]) -> str:
    """A hint for a glob that matches none of `names`: the nearest that does, or "" if none is near.

    Every word of the glob that is in no name is replaced by the most similar one.

    >>> nearest_glob("*.mpl.*", ["layers.0.mlp.up"]), nearest_glob("up", ["layers.0.mlp.up"])
    ("; did you mean '*.mlp.*'?", "; did you mean '*.up'?")
    """
    known = sorted({word for name in names for word in re.findall(r"\w+", name)})

    def mend(word: re.Match[str]) -> str:
        return (difflib.get_close_matches(word[0], known, 1) or [word[0]])[0]

    mended = re.sub(r"\w+", mend, glob)
    for near in (mended, f"*.{mended}", f"*{mended}*"):
        if fnmatch.filter(names, near):
            return f"; did you mean {near!r}?"
    return ""


def require_library(module: str, purpose: str, extra: str) -> None:
    """Check that an optional library is installed, without importing it.

    Args:
        module: The name by which it is imported.
        purpose: What needs it, as the subject of a sentence.
        extra: The extra of prunus that installs it.

    Raises:
        ModuleNotFoundError: It is not installed.

    >>> require_library("no_such_library", "reading maps", "maps")
    Traceback (most recent call last):
    ModuleNotFoundError: reading maps needs no_such_library: pip install '.[maps]'
    """
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{purpose} needs {module}: pip install '.[{extra}]'")


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


def about(seconds: float) -> str:
    """A time for people, who do not ask for seconds of an hour; at least a second.

    >>> about(0.2), about(41.3), about(700), about(9000)
    ('about 1 s', 'about 41 s', 'about 12 min', 'about 2.5 h')
    """
    units = (("s", 1, 120, 0), ("min", 60, 7200, 0), ("h", 3600, math.inf, 1))
    unit, size, _, digits = next(x for x in units if seconds < x[2])
    return f"about {max(seconds, 1) / size:.{digits}f} {unit}"


def in_bytes(count: int) -> str:
    """A number of bytes for people. All units are powers of 1000, as those of files.

    >>> in_bytes(56_623_104), in_bytes(2_500)
    ('56.6 MB', '2.5 kB')
    """
    unit, size = next((x for x in (("GB", 1e9), ("MB", 1e6)) if count >= x[1]), ("kB", 1e3))
    return f"{count / size:.1f} {unit}"
