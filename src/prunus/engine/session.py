"""Who hears how far a run is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from prunus.distributed import is_rank_0
from prunus.engine.progress import PREPARATION, Progress, pruning_step, reporter
from prunus.hardware.machine import peak_memory


@dataclass(frozen=True)
class Session:
    """The functions that hear of a run. They do not change the result.

    Attributes:
        announce: Called with what is being prepared, before the first step, and with the `Progress`
            of what takes long; None to be silent.
        report: Called after every step; None to be silent.
    """

    announce: Callable[[Any], None] | None = None
    report: Callable[..., None] | None = None

    def tell(self, message: str | Progress) -> None:
        """Announce what is done next; only the first of several processes does so."""
        if self.announce is not None and is_rank_0():
            self.announce(message)

    def step(self, *step: Any) -> None:
        """Report a finished step; only the first of several processes does so."""
        if self.report is not None and is_rank_0():
            self.report(*step)

    def preparing(self, what: str, total: int, device: torch.device) -> Callable[[int], None]:
        """Announce work before or after the blocks, and return a function that counts its steps.

        Args:
            what: The work in words, such as "measuring …".
            total: The steps of the work, each of about the same time.
            device: Where it is done, for its peak memory.

        Returns:
            A function to call with the number of steps that were done since its last call.
        """
        started = time.perf_counter()
        done = 0
        self.tell(what)

        def count(steps: int) -> None:
            nonlocal done
            done += steps
            seconds, peak = time.perf_counter() - started, peak_memory(device)
            left = seconds / done * (total - done) if done else None
            self.tell(Progress(done, total, what, seconds, peak, PREPARATION + what, left))

        return count


#: The session that tells nobody.
SILENT = Session()


@contextlib.contextmanager
def shown_session(
    title: str,
    progress: Callable[..., None] | bool | None,
    announce: Callable[[Any], None] | None,
) -> Iterator[Session]:
    """The session of a function that Python calls, which shows its progress.

    Args:
        title: A text at the beginning of the bar.
        progress: True shows a bar where a person looks: of every step, and of what is prepared
            before the first one. A function is called with the `Progress` of every step. Nothing
            is shown with False and None.
        announce: Called with what is being prepared; None leaves it to the bar.
    """
    with reporter(title, pruning_step, progress) as report:
        if announce is None and not callable(progress):
            announce = report
        yield Session(announce=announce, report=report)
