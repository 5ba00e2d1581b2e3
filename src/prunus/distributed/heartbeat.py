"""Heartbeats: every rank shows regularly that it lives, and watches the heartbeats of the others.

A thread of each rank writes a counter and the rank's location (what it works on) into the key-value
store that torchrun's rendezvous keeps. A rank that waits for another can thus name the one that
died, hangs, or raised an error, and no rank waits for ever:

- a rank that raises an error writes it into the store before it leaves;
- a process on the same host is looked up by its process id: it may be gone, or stopped by a signal;
- a rank whose counter stands still for `timeout` seconds hangs, or its host is gone;
- a rank whose counter moves, but that does not reach a collective call for `timeout` seconds, hangs
  as well.

The process group itself blocks when a rank is lost; the store answers a single rank at any time. It
ends with the process that keeps it, usually rank 0. So a rank that leaves because another one is
lost waits a moment until the rest have learnt the reason: afterwards they could not read it.

Keys of the store, per rank: `who` (host, namespace of process ids, process id), `beat` (counter,
number of collectives, location), `fault` (its error), and `heard` (it knows of a loss).
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

_LEFT = "left"  # the last heartbeat of a rank that left on purpose


class Heartbeat:
    """The heartbeats of all ranks of a run, as seen by one of them; after `timeout` s one is lost.

    `store` of torch.distributed has a connection of its own: a call that waits for a value would
    delay other users. `collectives` counts the calls that this rank has started; its `location` is
    for the messages of `others`.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.others = [other for other in range(size) if other != rank]
        self.collectives = 0
        self.location = "the start"
        self._store = store
        self._rank = rank
        self._timeout = timeout
        self._interval = min(2.0, max(0.1, timeout / 10))
        # Per other rank: its last heartbeat, and when this rank first saw it (time.monotonic).
        self._seen: dict[int, tuple[str, float]] = {}
        # What is known of a lost rank, for people; None while all are well.
        self._loss: str | None = None
        self._closed = threading.Event()
        self._beats = 0
        store.set(f"who/{rank}", _own_process())
        self._beat()
        # `get` waits until the other rank has written its key.
        self._processes = {
            other: store.get(f"who/{other}").decode().split("|") for other in self.others
        }
        # A thread, because the main thread may compute for minutes in one call of torch.
        self._thread = threading.Thread(target=self._run, name="prunus-heartbeat", daemon=True)
        self._thread.start()

    def check(self, waiting_since: float | None = None) -> None:
        """Raise if a rank is lost; `waiting_since` (monotonic) if this one waits in a call."""
        if self._loss is None and waiting_since is not None:
            waited = time.monotonic() - waiting_since
            if waited > self._timeout:
                self._loss = self._describe_late_rank(waited)
        if self._loss is not None:
            raise RankError(self._loss)

    def lost_rank_error(self, symptom: str) -> RankError:
        """The error for a symptom of a lost rank; names the rank if it can be learnt soon."""
        # A broken connection shows at once, the reason for it a little later. An error in the
        # store says more than that a process is gone, so the store comes first.
        deadline = time.monotonic() + 3 * self._interval
        while self._loss is None and time.monotonic() < deadline:
            try:
                self._read_others()
            except RuntimeError as fault:
                self._set_store_lost(fault)
            self._loss = self._loss or self._describe_dead_process()
            time.sleep(0.02)
        return RankError(self._loss or f"{symptom}; no rank is known to be lost")

    def report_error(self, message: str) -> None:
        """Tell the others of an error of this rank, and wait a moment until they have read it."""
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it the others
            self._store.set(f"fault/{self._rank}", message)
            self._wait_until_others_know()

    def close(self, rank_lost: bool = False) -> None:
        """Write the last heartbeat: this rank leaves on purpose, or has reported its error.

        Where another rank is lost, it first waits a moment until the rest know of that too.
        """
        if rank_lost:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"heard/{self._rank}", "")
                self._wait_until_others_know()
        self._closed.set()
        self._thread.join(5)
        with contextlib.suppress(RuntimeError):  # the process that keeps the store may be gone
            self._store.set(f"beat/{self._rank}", _LEFT)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._rank}", f"{self._beats}|{self.collectives}|{self.location}")

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            try:
                self._beat()
                self._read_others()
                if self._loss is not None:
                    self._store.set(f"heard/{self._rank}", "")
            except RuntimeError as fault:
                if not self._closed.is_set():
                    self._set_store_lost(fault)
                return

    def _set_store_lost(self, fault: RuntimeError) -> None:
        """Note that the store does not answer, unless a more exact reason is known already."""
        self._loss = self._loss or (
            "the rendezvous of torchrun does not answer any more: the host that keeps it, usually "
            f"that of rank 0, is gone or out of reach ({str(fault).splitlines()[0]})"
        )

    def _wait_until_others_know(self) -> None:
        """Wait until every rank that still runs knows of the loss, for at most ten intervals."""
        deadline = time.monotonic() + 10 * self._interval
        while time.monotonic() < deadline and not all(
            self._process_state(other) is not None
            or self._store.check([f"heard/{other}"])
            or self._store.check([f"fault/{other}"])
            or self._store.get(f"beat/{other}").decode() == _LEFT
            for other in self.others
        ):
            time.sleep(0.02)

    def _read_others(self) -> None:
        """Read the heartbeats and errors of the others, and note the first loss."""
        now = time.monotonic()
        for other in self.others:
            if self._store.check([f"fault/{other}"]):
                text = self._store.get(f"fault/{other}").decode()
                self._loss = f"rank {other}{self._where(other)} stopped: {text}"
                return
            beat = self._store.get(f"beat/{other}").decode()
            if other not in self._seen or self._seen[other][0] != beat:
                self._seen[other] = (beat, now)
        if self._loss is None:
            for other, (beat, since) in self._seen.items():
                if beat != _LEFT and now - since > self._timeout:
                    state = self._process_state(other) or "hangs, or its host is gone"
                    self._loss = (
                        f"rank {other}{self._where(other)} {state}: no heartbeat for "
                        f"{now - since:.0f} s; it was last at {beat.split('|')[-1]}"
                    )

    def _describe_dead_process(self) -> str | None:
        """Name a rank on this host whose process has ended or is stopped; None if there is none."""
        for other in self.others:
            left = self._seen.get(other, ("", 0.0))[0] == _LEFT
            if (state := self._process_state(other)) is not None and not left:
                return f"rank {other}{self._where(other)} {state}"
        return None

    def _describe_late_rank(self, waited: float) -> str:
        """Name the rank that has not reached the collective call in which this rank waits."""
        for other in self.others:
            fields = self._seen.get(other, ("", 0.0))[0].split("|")
            if len(fields) == 3 and int(fields[1]) < self.collectives:
                state = self._process_state(other) or "hangs"
                return (
                    f"rank {other}{self._where(other)} {state}: the others have waited for it at "
                    f"{self.location} for {waited:.0f} s, and it is at {fields[2]} "
                    "(`rank_timeout` gives it longer)"
                )
        return f"the ranks have waited for each other at {self.location} for {waited:.0f} s"

    def _where(self, other: int) -> str:
        host, _, process = self._processes[other]
        return f" (process {process} on {host})"

    def _process_state(self, other: int) -> str | None:
        """What is wrong with a process on this host; None if it runs or is on another host."""
        host, namespace, process = self._processes[other]
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
