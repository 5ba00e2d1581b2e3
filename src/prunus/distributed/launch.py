"""From torchrun's environment to the ranks of a run. torchrun starts processes and finds them; nothing here does."""

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

__all__ = ["DEFAULT_TIMEOUT", "is_rank_0", "process_group"]

#: Seconds after which a rank that gives no sign, or does not come to a meeting, counts as lost.
DEFAULT_TIMEOUT = 600.0
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_joined_before = itertools.count()


def is_rank_0() -> bool:
    """Whether this process is the one that speaks: rank 0, or not started by torchrun at all."""
    return not _started_by_torchrun() or os.environ["RANK"] == "0"


def _started_by_torchrun() -> bool:
    return all(os.environ.get(name) for name in _NAMES) and int(os.environ["WORLD_SIZE"]) > 1


@contextlib.contextmanager
def process_group(timeout: float | None = None) -> Iterator[Ranks]:
    """While active, the ranks that torchrun started, of which this process is one; `SINGLE_PROCESS` without torchrun.

    Args:
        timeout: seconds after which a rank that gives no sign of life, or does not come to a meeting, counts as lost;
            None for `DEFAULT_TIMEOUT`.

    Raises:
        ValueError: a timeout that is not over 0, or a process group that somebody else set up.
        RankError: inside, wherever this rank waits for one that is lost.
    """
    timeout = DEFAULT_TIMEOUT if timeout is None else timeout
    if not (math.isfinite(timeout) and timeout > 0):
        raise ValueError(f"the rank timeout is {timeout}: it is a number of seconds over 0")
    if not _started_by_torchrun():
        yield SINGLE_PROCESS
        return
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed is in use already: prunus sets its process group up itself under torchrun; call "
            "destroy_process_group before, or give ranks=prunus.distributed.SINGLE_PROCESS"
        )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    generous = datetime.timedelta(seconds=2 * timeout + 60)  # the watch comes first, and says who
    store, rank, size = next(rendezvous("env://", timeout=generous))
    name = f"prunus/{next(_joined_before)}"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=PrefixStore(f"{name}/group", store),
        rank=rank,
        world_size=size,
        timeout=generous,
    )
    watch = Heartbeat(_own_store(store, name, timeout), rank, size, timeout)
    group, lost = ProcessGroup(watch), False
    try:
        with _told_to_stop(watch):
            yield group
    except RankError:
        lost = True
        raise
    except OtherRankError:
        raise
    except BaseException as fault:
        if not group.told:
            watch.report(f"{type(fault).__name__}: {fault}".strip(": "))
        raise
    finally:
        watch.close(lost)
        if not lost:  # a group that lost a member waits for it before it closes
            dist.destroy_process_group()


def _own_store(store: Any, name: str, timeout: float) -> Any:
    """A connection that only the watch uses: one that waits for a value would hold the others up."""
    prefixed: Any = PrefixStore(f"{name}/watch", store)
    own = prefixed.clone()
    own.set_timeout(datetime.timedelta(seconds=max(10.0, timeout)))
    return own


@contextlib.contextmanager
def _told_to_stop(watch: Heartbeat) -> Iterator[None]:
    """While active, SIGTERM is an error that says why: torchrun sends it to all once one rank has ended badly."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough
        raise watch.explain("stopped from outside (SIGTERM)")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
