"""Who works on a run, and who hears how far it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks, process_group
from prunus.engine.progress import PREPARATION, Progress, pruning_step, reporter
from prunus.hardware.machine import peak_memory


@dataclass(frozen=True)
class Session:
    """The processes of a run, and the functions that hear of it. Neither changes the result.

    Attributes:
        ranks: The processes that work on the run together.
        announce: Called with what is being prepared, before the first step, and with the `Progress`
            of what takes long; None to be silent.
        report: Called after every step; None to be silent.
    """

    ranks: Ranks = SINGLE_PROCESS
    announce: Callable[[Any], None] | None = None
    report: Callable[..., None] | None = None

    @contextlib.contextmanager
    def joined(self, timeout: float | None) -> Iterator[Session]:
        """The session with all processes that torchrun started, for the length of a `with` block.

        A session that has several processes already keeps them.

        Args:
            timeout: Seconds after which a process without a sign of life counts as lost; None for
                the default.
        """
        if self.ranks.size > 1:
            yield self
            return
        with process_group(timeout) as ranks:
            yield replace(self, ranks=ranks)

    def tell(self, message: str | Progress) -> None:
        """Announce what is done next; only the first of several processes does so."""
        if self.announce is not None and self.ranks.rank == 0:
            self.announce(message)

    def step(self, *step: Any) -> None:
        """Report a finished step; only the first of several processes does so."""
        if self.report is not None and self.ranks.rank == 0:
            self.report(*step)

    def preparing(self, what: str, total: int, device: torch.device) -> Callable[[int], None]:
        """Announce work before the first block, and return a function that counts its steps.

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
            self.tell(Progress(done, total, what, seconds, peak, PREPARATION + what))

        return count


#: The session of one process that tells nobody.
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
