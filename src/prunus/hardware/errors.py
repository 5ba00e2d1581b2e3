"""What an error says, in one line for people."""

from __future__ import annotations

#: Errors whose message says enough without the name of their type.
_CLEAR = (OSError, ValueError, NotImplementedError, ImportError, MemoryError)


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
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if not isinstance(error, _CLEAR) or not text:
        text = f"{type(error).__name__}: {text or 'no message'}"
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most].rsplit(" ", 1)[0] + " …"
