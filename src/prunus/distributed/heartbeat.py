"""Signs of life: every rank gives one every so often, and looks at those of the others.

A thread of each rank writes a counter, and where its rank stands, into the store that torchrun's rendezvous keeps. Who
has died, hangs, or has met an error can so be named by those who wait for it, and nobody waits for ever:

- an error is written into the store before its rank leaves;
- a process on the same machine is looked up by its number: gone, or stopped by a signal;
- a rank whose counter stands still for `timeout` seconds hangs, or its machine is gone;
- a rank whose counter moves but that does not come to a meeting for `timeout` seconds hangs as well.

The store goes with the process that keeps it, as a rule rank 0's. A rank that leaves because another is lost therefore
waits a moment until the rest have heard it too: they could not read the reason afterwards.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from prunus.distributed.base import RankError

__all__ = ["Heartbeat"]

_LEFT = "left"


class Heartbeat:
    """The signs of life of all ranks of a run, as one of them sees them.

    Args:
        store: of torch.distributed; used by the watch alone.
        rank, size: as of `Ranks`.
        timeout: seconds of silence after which a rank counts as lost.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self._store = store
        self._rank, self._others = rank, [other for other in range(size) if other != rank]
        self._timeout = timeout
        self._interval = min(2.0, max(0.1, timeout / 10))
        self.meeting = 0
        self.place = "the start"
        self._seen: dict[int, tuple[str, float]] = {}
        self._trouble: str | None = None
        self._over = threading.Event()
        self._beats = 0
        store.set(f"who/{rank}", _whoami())
        self._beat()
        # Waits until everybody has written it.
        self._who = {other: store.get(f"who/{other}").decode().split("|") for other in self._others}
        self._thread = threading.Thread(target=self._run, name="prunus-watch", daemon=True)
        self._thread.start()

    def check(self, waiting_since: float | None = None) -> None:
        """Raise if a rank is known to be lost; for those who wait for one, since when they do (time.monotonic).

        Raises:
            RankError: names it.
        """
        if self._trouble is None and waiting_since is not None:
            waited = time.monotonic() - waiting_since
            if waited > self._timeout:
                self._trouble = self._absent(waited)
        if self._trouble is not None:
            raise RankError(self._trouble)

    def claim(self, what: str) -> int:
        """The next number of `what`, from 0, that no rank has had."""
        return int(self._store.add(f"claim/{what}", 1)) - 1

    def arrivals(self, what: str) -> list[int]:
        """Say that this rank is through with `what`; returns the others."""
        self._store.set(f"through/{what}/{self._rank}", "")
        return self._others

    def has_arrived(self, what: str, rank: int) -> bool:
        """Whether another rank is through with `what`."""
        return bool(self._store.check([f"through/{what}/{rank}"]))

    def explain(self, what: str) -> RankError:
        """The error for something that only a lost rank can have caused; waits a moment to learn which."""
        # An error that was written down says more than that its process has gone.
        deadline = time.monotonic() + 3 * self._interval
        while self._trouble is None and time.monotonic() < deadline:
            try:
                self._look()
            except RuntimeError as fault:
                self._unreachable(fault)
            self._trouble = self._trouble or self._dead()
            time.sleep(0.02)
        return RankError(self._trouble or f"{what}; no rank is known to be lost")

    def report(self, message: str) -> None:
        """Tell the others of an error, and give them time to hear of it before this process goes."""
        with contextlib.suppress(RuntimeError):  # nobody there to tell
            self._store.set(f"fault/{self._rank}", message)
            self._wait_until_heard()

    def close(self, lost: bool = False) -> None:
        """Give the last sign: this rank has left in peace, or said why it did not.

        Args:
            lost: it leaves because another is lost; the rest are then given time to hear of that.
        """
        if lost:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"heard/{self._rank}", "")
                self._wait_until_heard()
        self._over.set()
        self._thread.join(5)
        with contextlib.suppress(RuntimeError):  # the store goes with the process that keeps it
            self._store.set(f"beat/{self._rank}", _LEFT)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._rank}", f"{self._beats}|{self.meeting}|{self.place}")

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            try:
                self._beat()
                self._look()
                if self._trouble is not None:
                    self._store.set(f"heard/{self._rank}", "")
            except RuntimeError as fault:
                if not self._over.is_set():
                    self._unreachable(fault)
                return

    def _unreachable(self, fault: RuntimeError) -> None:
        """The store does not answer; what was known before says more than that."""
        self._trouble = self._trouble or (
            "the rendezvous of torchrun does not answer any more: the machine that keeps it, as a rule rank 0's, is "
            f"gone or out of reach ({str(fault).splitlines()[0]})"
        )

    def _wait_until_heard(self) -> None:
        """Until every rank that can still hear knows that one is lost, ten looks at most."""
        deadline = time.monotonic() + 10 * self._interval
        while time.monotonic() < deadline and not all(
            self._state(other) is not None
            or self._store.check([f"heard/{other}"])
            or self._store.check([f"fault/{other}"])
            or self._store.get(f"beat/{other}").decode() == _LEFT
            for other in self._others
        ):
            time.sleep(0.02)

    def _look(self) -> None:
        """See what the others have written."""
        now = time.monotonic()
        for other in self._others:
            if self._store.check([f"fault/{other}"]):
                text = self._store.get(f"fault/{other}").decode()
                self._trouble = f"rank {other}{self._where(other)} stopped: {text}"
                return
            beat = self._store.get(f"beat/{other}").decode()
            if other not in self._seen or self._seen[other][0] != beat:
                self._seen[other] = (beat, now)
        if self._trouble is None:
            for other, (beat, since) in self._seen.items():
                if beat != _LEFT and now - since > self._timeout:
                    self._trouble = (
                        f"rank {other}{self._where(other)} {self._state(other) or 'hangs, or its machine is gone'}: no "
                        f"sign of life for {now - since:.0f} s; it was last at {beat.split('|')[-1]}"
                    )

    def _dead(self) -> str | None:
        """A rank of this machine whose process has ended or is stopped."""
        for other in self._others:
            left = self._seen.get(other, ("", 0.0))[0] == _LEFT
            if (state := self._state(other)) is not None and not left:
                return f"rank {other}{self._where(other)} {state}"
        return None

    def _absent(self, waited: float) -> str:
        """Who has not come to the meeting that this rank waits at."""
        for other in self._others:
            fields = self._seen.get(other, ("", 0.0))[0].split("|")
            if len(fields) == 3 and int(fields[1]) < self.meeting:
                state = self._state(other) or "hangs"
                return (
                    f"rank {other}{self._where(other)} {state}: it has been waited for at {self.place} for "
                    f"{waited:.0f} s, and is at {fields[2]} (--rank-timeout gives it longer)"
                )
        return f"the ranks have waited for each other at {self.place} for {waited:.0f} s"

    def _where(self, other: int) -> str:
        host, _, process = self._who[other]
        return f" (process {process} on {host})"

    def _state(self, other: int) -> str | None:
        """What is wrong with a process of this machine, as far as its number tells."""
        mine = self._whoami_here()
        host, space, process = self._who[other]
        if (host, space) != mine or not Path("/proc/self/stat").exists():
            return None
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return "has died"
        return {"Z": "has died", "X": "has died", "T": "is stopped by a signal"}.get(state)

    @staticmethod
    def _whoami_here() -> tuple[str, str]:
        host, space, _ = _whoami().split("|")
        return host, space


def _whoami() -> str:
    """Host, namespace of process numbers, process number."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = "-"
    return f"{socket.gethostname()}|{space}|{os.getpid()}"
