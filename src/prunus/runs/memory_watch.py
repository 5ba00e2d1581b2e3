"""Ends a run that grows beyond its plan before the system kills it, and says so."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Self

from prunus.hardware.memory import available_memory, resident_memory
from prunus.runs.job import RunJob

#: With less than this many free bytes, the system begins to swap and to kill.
_LEAST_FREE = 3 * 10**8
_SECONDS_BETWEEN_LOOKS = 0.25
#: Interrupts the main thread. A shell lets programs in the background ignore SIGINT.
_SIGNAL = signal.SIGUSR1


class MemoryWatch:
    """While active, looks at the memory of this process and of the machine.

    A run within its plan is left alone, whatever other programs take. Where the run holds more than
    was planned and nearly nothing is free, it ends with a `MemoryError` that gives both figures.
    Finished blocks are kept.
    """

    def __init__(self, job: RunJob) -> None:
        self._planned = job.peak_bytes() + resident_memory()
        self._fault: str | None = None
        self._ended = threading.Event()
        # Only the main thread gets signals.
        runs_in_main = threading.current_thread() is threading.main_thread()
        on_host = runs_in_main and job.device.type == "cpu"
        self._thread = threading.Thread(target=self._look, daemon=True) if on_host else None

    def _look(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_LOOKS):
            held = resident_memory()
            if held > self._planned and available_memory() < _LEAST_FREE:
                self._fault = (
                    f"the run holds {held / 1e9:.1f} GB where {self._planned / 1e9:.1f} GB were "
                    "planned, and no memory is left. Finished blocks are kept: run the same "
                    "command again with a lower `memory`, such as half of the machine's"
                )
                signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
                return

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._handler = signal.signal(_SIGNAL, signal.default_int_handler)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            signal.signal(_SIGNAL, self._handler or signal.SIG_DFL)
        if self._fault is not None and isinstance(error, KeyboardInterrupt):
            raise MemoryError(self._fault) from None
