"""Reading the next block and writing the last one while the current one is changed.

Two threads do it, one for each direction. They change nothing but the time: blocks are read and
written one at a time and in order, a shard still gets its final name before the manifest names it,
and an error ends the run. Both hold at most one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

T = TypeVar("T")


def read_ahead(indices: Iterable[int], read: Callable[[int], T], overlaps: bool) -> Iterator[T]:
    """Yield `read(index)` for each index, and read the next one meanwhile.

    The next one is read from the moment when its predecessor is taken, so the caller computes with
    one block while the other arrives.

    Args:
        overlaps: False reads each one when it is asked for.

    >>> list(read_ahead([1, 2, 3], lambda index: 10 * index, overlaps=True))
    [10, 20, 30]
    """
    if not overlaps:
        yield from map(read, indices)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read") as executor:
        coming: Future[T] | None = None
        for index in indices:
            ready, coming = coming, executor.submit(read, index)
            if ready is not None:
                yield ready.result()
            # What was taken can leave memory before the next one is asked for.
            del ready
        if coming is not None:
            yield coming.result()


class BackgroundWrites:
    """Runs writes one at a time and in order, on a thread of its own.

    Leaving the `with` waits for the last write, also if an error ends the run: what is finished is
    not lost. An error of a write is raised by the next call.

    >>> with BackgroundWrites(overlaps=True) as writes:
    ...     writes.submit(lambda: print("written"))
    written
    """

    def __init__(self, overlaps: bool) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="write") if overlaps else None
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Wait for the write before this one, then begin this one.

        Raises:
            Exception: the write before this one failed; its error.
        """
        self.wait()
        if self._executor is None:
            write()
        else:
            self._last = self._executor.submit(_without_gradients, write)

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            Exception: a write failed; its error.
        """
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True)
        if error is None:
            self.wait()


def _without_gradients(write: Callable[[], None]) -> None:
    # Each thread has a gradient mode of its own.
    with torch.no_grad():
        write()
