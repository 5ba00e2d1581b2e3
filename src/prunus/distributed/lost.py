"""Which rank is lost: found out once, when a collective call fails or takes too long.

torch ends a call with an error when a connection breaks, and does not say whose. So a rank with
such an error, or with one of its own, leaves a note in the key-value store that torchrun's
rendezvous keeps, and the ranks that wait in a call follow it. Then a rank has stopped whose note
tells of an error, and a rank is lost that leaves no note.

The store ends with the process that keeps it, torchrun or rank 0. So rank 0 stays a moment until
the others have read the notes.

Keys of the store: `alarm` (there are notes), and per rank `who` (host, namespace of process ids,
process id), `note` (its own error; empty where it has none), and `read` (it has read the others').
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prunus.distributed.base import RankError

#: Seconds in which a rank that runs leaves a note, or reads those of the others.
_PATIENCE = 5.0


class Notes:
    """What the ranks of a run tell each other when one of them is lost.

    Args:
        store: A store of torch.distributed with a connection of its own: a call that waits for a
            value would delay other users of the connection.
        rank: Number of this rank.
        size: Number of ranks.

    Attributes:
        others: Numbers of all ranks but this one.
        location: What this rank works on, for the messages of its errors.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.others = [other for other in range(size) if other != rank]
        self.location = "the start"
        self._store = store
        self._rank = rank
        store.set(f"who/{rank}", _own_process())

    def there_are_some(self) -> bool:
        """Whether a rank has left a note.

        Raises:
            RuntimeError: The store is gone, and with it the process that keeps it.
        """
        return bool(self._store.check(["alarm"]))

    def lost_rank_error(self, symptom: str) -> RankError:
        """The error for a symptom of a lost rank; it names the rank, its host and its process.

        Leaves an empty note, so that the others know that this rank lives, and waits up to
        `_PATIENCE` seconds for theirs.

        Args:
            symptom: What was noticed, such as a broken connection. It stands in the message only if
                no rank is known to be lost.
        """
        answered: list[int] = []
        try:
            self._leave("")
            silent = self._without("note", self.others)
            answered = [other for other in self.others if other not in silent]
            errors = {other: self._store.get(f"note/{other}").decode() for other in answered}
            named = [f"{self._name(o)} stopped: {text}" for o, text in errors.items() if text]
            named = named or self._describe(silent)
        except RuntimeError as fault:
            named = [
                "the rendezvous of torchrun does not answer any more: the host that keeps it, "
                f"usually that of rank 0, is gone or out of reach ({str(fault).splitlines()[0]})"
            ]
        self._stay(answered)
        lost_ranks = "; ".join(named) or f"{symptom}; no rank is known to be lost"
        return RankError(f"{lost_ranks} (this rank was at {self.location})")

    def report_error(self, message: str) -> None:
        """Tell the others of an error of this rank, which ends. It stays until they have read it.

        Args:
            message: The text that their errors quote.
        """
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it the others
            self._leave(message)
        self._stay(self.others)

    def _stay(self, others: list[int]) -> None:
        """Say that this rank has read the notes. Rank 0, which may keep the store, waits a moment
        until the others have read them too.
        """
        with contextlib.suppress(RuntimeError):
            self._store.set(f"read/{self._rank}", "")
            if self._rank == 0:
                self._without("read", others)

    def _leave(self, message: str) -> None:
        self._store.set(f"note/{self._rank}", message)
        self._store.set("alarm", "")

    def _without(self, kind: str, ranks: Iterable[int]) -> list[int]:
        """The ranks that leave no key of this kind within `_PATIENCE` s, or that have died."""
        deadline = time.monotonic() + _PATIENCE
        missing = [rank for rank in ranks if not self._store.check([f"{kind}/{rank}"])]
        while time.monotonic() < deadline and any(not self._state(rank) for rank in missing):
            time.sleep(0.02)
            missing = [rank for rank in missing if not self._store.check([f"{kind}/{rank}"])]
        return missing

    def _describe(self, silent: list[int]) -> list[str]:
        """What is wrong with ranks without a note: with the processes that are known to have died
        or to be stopped, or else with all of them, some of which may only compute.
        """
        dead = [f"{self._name(rank)} {self._state(rank)}" for rank in silent if self._state(rank)]
        remedy = "hangs, is late (`rank_timeout` gives it longer), or its host is gone"
        return dead or [f"{self._name(rank)} {remedy}" for rank in silent]

    def _name(self, rank: int) -> str:
        host, _, process = self._process(rank)
        return f"rank {rank} (process {process} on {host})"

    def _process(self, rank: int) -> list[str]:
        fields: list[str] = self._store.get(f"who/{rank}").decode().split("|")
        return fields

    def _state(self, rank: int) -> str | None:
        """What is wrong with a process on this host; None if it runs or is on another host."""
        host, namespace, process = self._process(rank)
        own_host, own_namespace, _ = _own_process().split("|")
        same_ids = (host, namespace) == (own_host, own_namespace)
        if not same_ids or not Path("/proc/self/stat").exists():
            return None
        try:
            # The state follows the process's name, which stands in brackets and may hold any text.
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return "has died"
        return {"Z": "has died", "X": "has died", "T": "is stopped by a signal"}.get(state)


def _own_process() -> str:
    """Host, namespace and process id of this process, divided by `|`; containers may share ids."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = "-"
    return f"{socket.gethostname()}|{namespace}|{os.getpid()}"
