"""Ranks for tests: processes with torchrun's environment, forked from one that has torch."""

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def forked(size: int, work: Callable[[int], Any]) -> Iterator[list[int]]:
    """While active, `size` processes run `work(rank)`; yields their process numbers.

    The parent must compute on one thread, and must have no process group of its own.
    """
    port, children = free_port(), []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "LOCAL_WORLD_SIZE": str(size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                # Rank 0 serves the store. A rank that connects before it waits for a second.
                time.sleep(0.15 if rank else 0)
                work(rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    try:
        yield children
    finally:
        for child in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


def in_ranks(size: int, work: Callable[[int], Any]) -> list[int]:
    with forked(size, work) as children:
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def answers(size: int, work: Callable[[int], Any], scratch: Path) -> list[Any]:
    """Run `work(rank)` on `size` ranks; returns what each of them returned, as JSON has it."""

    def answer(rank: int) -> None:
        (scratch / f"answer {rank}").write_text(json.dumps(work(rank)))

    status = in_ranks(size, answer)
    assert not any(status), status
    return [json.loads((scratch / f"answer {rank}").read_text()) for rank in range(size)]
