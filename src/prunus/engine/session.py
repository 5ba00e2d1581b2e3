"""Who works on a run, and who hears how far it is."""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks, process_group
from prunus.engine.progress import PREPARATION, Progress, pruning_step, reporter
from prunus.hardware.memory import peak_memory


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

_Function = TypeVar("_Function", bound=Callable[..., Any])
#: What a docstring says of the keyword that `with_session` adds.
_KEYWORD = (
    "    progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. "
    "A function is called after every block.\n"
)


def with_session(title: str) -> Callable[[_Function], _Function]:
    """Give a function a keyword `progress`, and a `session` that it makes of it.

    With True a bar shows every step, and what is prepared before the first one. A function is
    called with the `Progress` of every step. Nothing is shown with False and None, and where nobody
    would see a bar.

    Args:
        title: A text at the beginning of the bar.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def showing(*arguments: Any, progress: Any = True, **options: Any) -> Any:
            with reporter(title, pruning_step, progress) as report:
                announce = options.pop("announce", None if callable(progress) else report)
                session = Session(announce=announce, report=report)
                return function(*arguments, session=session, **options)

        signature = inspect.signature(function)
        keyword = inspect.Parameter(
            "progress",
            inspect.Parameter.KEYWORD_ONLY,
            default=True,
            annotation="Callable[..., None] | bool | None",
        )
        parameters = [p for p in signature.parameters.values() if p.name != "session"]
        showing.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*parameters, keyword]
        )
        showing.__doc__ = f"{function.__doc__}{_KEYWORD}"
        return cast(_Function, showing)

    return decorate
