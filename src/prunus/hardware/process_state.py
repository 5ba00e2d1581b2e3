"""Values of the whole process, such as the filters of warnings, replaced for a while."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from threading import Lock
from typing import Any

_LOCK = Lock()
#: Id of an object, and name of its attribute -> its value before, and how many `replaced` it has.
_REPLACED: dict[tuple[int, str], list[Any]] = {}


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While active, `owner.name` is `value` in all threads. The last to leave puts it back.

    Context managers that note a value and put it back, such as those of Python for warnings and
    stderr, fail where threads overlap: the second notes what the first has set, and that stays. So
    prunus replaces attributes of other libraries by this function alone. Calls that overlap for one
    attribute must give values of the same effect. `owner` must outlive the `with`.

    >>> import types
    >>> owner = types.SimpleNamespace(name="before")
    >>> with replaced(owner, "name", 1), replaced(owner, "name", 1):
    ...     owner.name
    1
    >>> owner.name
    'before'
    """
    key = (id(owner), name)
    with _LOCK:
        state = _REPLACED.setdefault(key, [getattr(owner, name), 0])
        state[1] += 1
        setattr(owner, name, value)
    try:
        yield
    finally:
        with _LOCK:
            state[1] -= 1
            if not state[1]:
                setattr(owner, name, _REPLACED.pop(key)[0])


def no_warnings() -> contextlib.AbstractContextManager[None]:
    """While active, Python shows no warnings, of no thread."""
    return replaced(warnings, "filters", [("ignore", None, Warning, None, 0)])


def no_stderr() -> contextlib.AbstractContextManager[None]:
    """While active, what any thread writes to `sys.stderr` is dropped."""
    return replaced(sys, "stderr", io.StringIO())
