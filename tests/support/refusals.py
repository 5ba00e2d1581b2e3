"""Errors for people: what is refused changes no file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny import tree


def held(path: Path) -> object:
    """What is at a path: the files of a folder, the bytes of a file, or None."""
    return tree(path) if path.is_dir() else path.read_bytes() if path.is_file() else None


def assert_refused(
    fault: type[Exception] | tuple[type[Exception], ...],
    words: str,
    work: Callable[..., object],
    *arguments: Any,
    **options: Any,
) -> None:
    """Check that a call raises an error with these words, and changes nothing that it was given.

    Every path among its arguments holds afterwards what it held before, and one at which there was
    nothing is still empty. So a test need not look at the folder of the result as well.

    Args:
        fault: the class of the error.
        words: a regular expression that is found in its message.
        work: what is called.
        arguments: of `work`.
        options: keywords of `work`.
    """
    paths = [each for each in (*arguments, *options.values()) if isinstance(each, Path)]
    before = [held(path) for path in paths]
    with pytest.raises(fault, match=words):
        work(*arguments, **options)
    assert [held(path) for path in paths] == before
