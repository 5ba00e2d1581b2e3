"""From torchrun's environment variables to the ranks of a run.

torchrun starts the processes and lets them find each other; this file only joins them.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from prunus.distributed.base import SINGLE_PROCESS, OtherRankError, RankError, Ranks
from prunus.distributed.group import ProcessGroup
from prunus.distributed.heartbeat import Heartbeat

#: Seconds after which a rank without a heartbeat, or late for a collective call, counts as lost.
DEFAULT_TIMEOUT = 600.0
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Counts the process groups of this process. All ranks count equally, so the number names a group.
_group_numbers = itertools.count()


def is_rank_0() -> bool:
    """Whether this process is rank 0, which alone writes to the terminal; true without torchrun."""
    return not _started_by_torchrun() or os.environ["RANK"] == "0"


def _started_by_torchrun() -> bool:
    """Whether torchrun started this process as one of several.

    torchrun sets all four variables. One of them alone, such as a RANK that a shell or a scheduler
    has set, means nothing.
    """
    values = [os.environ.get(name, "") for name in _VARIABLES]
    return all(values) and all(x.isdecimal() for x in values[:2]) and int(values[1]) > 1


@contextlib.contextmanager
def process_group(timeout: float | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started, for the length of a `with` block.

    All ranks must enter it. Without torchrun it yields `SINGLE_PROCESS`.

    Args:
        timeout: seconds after which a rank without a heartbeat, or late for a collective call,
            counts as lost; None for `DEFAULT_TIMEOUT`.

    Raises:
        ValueError: the timeout is not above 0, torch.distributed is in use already, or torchrun's
            variables hold no numbers.
        RankError: inside the block, wherever this rank waits for one that is lost.
    """
    timeout = DEFAULT_TIMEOUT if timeout is None else timeout
    _check_variables()
    if not (math.isfinite(timeout) and timeout > 0):
        raise ValueError(f"the rank timeout is {timeout}; it must be a number of seconds above 0")
    if not _started_by_torchrun():
        yield SINGLE_PROCESS
        return
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed is in use already, and prunus sets up its own process group under "
            "torchrun; call destroy_process_group first, or pass "
            "ranks=prunus.distributed.SINGLE_PROCESS"
        )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # torch's own timeout is longer than ours: the heartbeat comes first, and names the lost rank.
    torch_timeout = datetime.timedelta(seconds=2 * timeout + 60)
    store, rank, size = next(rendezvous("env://", timeout=torch_timeout))
    name = f"prunus/{next(_group_numbers)}"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=PrefixStore(f"{name}/group", store),
        rank=rank,
        world_size=size,
        timeout=torch_timeout,
    )
    heartbeat = Heartbeat(_own_connection(store, name, timeout), rank, size, timeout)
    group, rank_lost = ProcessGroup(heartbeat), False
    try:
        with _sigterm_raises(heartbeat):
            yield group
    except RankError:
        rank_lost = True
        raise
    except OtherRankError:
        raise
    except BaseException as fault:
        if not group.error_reported:
            heartbeat.report_error(f"{type(fault).__name__}: {fault}".strip(": "))
        raise
    finally:
        heartbeat.close(rank_lost)
        # Destroying a group that has lost a member would wait for that member.
        if not rank_lost:
            dist.destroy_process_group()


def _check_variables() -> None:
    """Check that RANK and WORLD_SIZE are numbers, where all variables of torchrun are set."""
    if not all(os.environ.get(name) for name in _VARIABLES):
        return
    for name in ("RANK", "WORLD_SIZE"):
        if not os.environ[name].isdecimal():
            raise ValueError(
                f"the environment variable {name} is {os.environ[name]!r}, and torchrun sets it to "
                "a number: start prunus with torchrun, or unset "
                f"{', '.join(_VARIABLES)} for a single process"
            )


def _own_connection(store: Any, name: str, timeout: float) -> Any:
    """A connection to the store for the heartbeat alone.

    A call that waits for a value blocks its connection, and heartbeats must not be delayed.
    """
    prefixed: Any = PrefixStore(f"{name}/watch", store)
    own = prefixed.clone()
    own.set_timeout(datetime.timedelta(seconds=max(10.0, timeout)))
    return own


@contextlib.contextmanager
def _sigterm_raises(heartbeat: Heartbeat) -> Iterator[None]:
    """While active, SIGTERM raises an error that says why it came.

    torchrun sends SIGTERM to all processes once one of them has ended badly.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows signal handlers in the main thread only.
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the clean-up
        raise heartbeat.lost_rank_error("stopped from outside (SIGTERM)")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
