"""What an error says, in one line for people."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import importlib.util
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


def did_you_mean(wrong: object, choices: Iterable[str], what: str = "") -> str:
    """A hint for a misspelt name: the most similar of `choices`, or "" if none is similar.

    The messages that end with it list all choices before. `what` says what is meant.

    >>> did_you_mean("balence", ["fast", "balanced"]), did_you_mean("x", ["fast", "balanced"])
    ('; did you mean balanced?', '')
    """
    # Upper and lower case are one for the similarity, as in Q4K and q4_k.
    names = {name.lower(): name for name in choices}
    near = difflib.get_close_matches(str(wrong).lower(), names, n=1)
    return f"; did you mean {what}{names[near[0]]}?" if near else ""


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
