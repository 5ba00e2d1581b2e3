"""One request while it is computed, known to everything that works on it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar


class Job:
    """A request between its arrival and the last byte of its answer.

    Attributes:
        cancelled: set when nobody waits for the answer any more. The thread that generates checks
            it before every token.
        gone: the same for the event loop.
        slot: while the request waits for its turn; the result is True when the turn comes, and
            False when the client is gone.
        stop: stop sequences; the answer ends before the first of them.
        seed: seed of the random numbers, or None.
    """

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.gone = asyncio.Event()
        self.slot: asyncio.Future[bool] | None = None
        self.stop: tuple[str, ...] = ()
        self.seed: int | None = None

    def cancel(self) -> None:
        """End the work on this request. Called in the event loop."""
        self.cancelled.set()
        self.gone.set()
        if self.slot is not None and not self.slot.done():
            self.slot.set_result(False)


_current: ContextVar[Job] = ContextVar("_current")


def current_job() -> Job:
    """The request on which the current task works."""
    return _current.get()


@contextlib.contextmanager
def working_on(job: Job) -> Iterator[None]:
    """While active, `current_job` is this job, also in tasks that are started meanwhile."""
    token = _current.set(job)
    try:
        yield
    finally:
        _current.reset(token)
