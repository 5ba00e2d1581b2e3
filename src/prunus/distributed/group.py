"""`Ranks` over a process group of torch: gloo between CPUs, NCCL between CUDA devices.

A collective never ends where a rank hangs, and NCCL does not notice that a rank has died. So every
collective starts in the background here, and this rank looks in turn at it and at the clock.

Texts travel as bytes and other values as JSON. Nothing is pickled: a pickle can run code.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from prunus.distributed.base import RankError, Ranks, ranks, using

_MAX_SLEEP = 1e-3  # seconds between two looks at a collective
_SPIN = 1e-3  # seconds in which a rank that waits does not sleep
_FIRST_SLEEP = 2e-5  # seconds; each next sleep is longer
#: Seconds after which a rank that is late for a collective call counts as lost.
DEFAULT_TIMEOUT = 600.0
# The environment variables that torchrun sets and torch's rendezvous reads.
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Counts the process groups of this process. All ranks count equally, so the number names a group.
_group_numbers = itertools.count()


class ProcessGroup(Ranks):
    """Ranks over torch's default process group; `Ranks` says what each call does.

    Every collective call raises RankError if it does not end because a rank is lost or late.

    Args:
        timeout: Seconds after which a rank that is late for a collective call counts as lost.
    """

    def __init__(self, timeout: float) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._timeout = timeout

    def gather_ints(self, numbers: Sequence[int]) -> list[list[int]]:
        """The integers of every rank, by rank, in one message."""
        numbers_here = torch.tensor(list(numbers), dtype=torch.int64)
        return [x.tolist() for x in self._gather(numbers_here)]

    def gather_text(self, text: str) -> list[str]:
        """The text of every rank, by rank: their lengths first, then the bytes if there are any."""
        data = text.encode()
        # frombuffer refuses an empty buffer, so an empty text starts from one byte.
        letters = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
        return [bytes(part.tolist()).decode() for part in self._gather_uneven(letters)]

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over the ranks, in place, by torch's all-reduce."""
        self._wait(lambda: dist.all_reduce(tensor, async_op=True))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Take over the bytes of the tensor of rank `source`. An empty tensor costs no message."""
        if tensor.numel():
            # As bytes: gloo and NCCL do not carry every dtype.
            data = tensor.view(-1).view(torch.uint8)
            self._wait(lambda: dist.broadcast(data, src=source, async_op=True))

    def all_gather(
        self, tensor: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Concatenate the tensors (n, …) of all ranks; see `_gather_uneven`."""
        return torch.cat(self._gather_uneven(tensor.contiguous(), lengths))

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, which have the same shape."""
        received = [torch.empty_like(tensor) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(received, tensor, async_op=True))
        return received

    def _gather_uneven(
        self, tensor: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """The tensors (n, …) of all ranks, where n differs.

        They travel padded to the longest, because a collective needs one shape, and as bytes,
        because gloo and NCCL do not carry every dtype.
        """
        if lengths is None:
            lengths = [numbers[0] for numbers in self.gather_ints([len(tensor)])]
        longest = max(lengths)
        if not longest:
            return [tensor.new_empty((n, *tensor.shape[1:])) for n in lengths]
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = self._gather(padded.reshape(-1).view(torch.uint8))
        return [
            part.view(tensor.dtype).view(longest, *tensor.shape[1:])[:n]
            for part, n in zip(parts, lengths, strict=True)
        ]

    def _wait(self, start: Callable[[], Any]) -> None:
        """Run one collective, which `start` starts in the background, until it is done.

        Raises:
            RankError: A rank is late by more than the timeout, or its connection broke: it has
                died, or ended with an error.
        """
        begun = time.monotonic()
        pause = _FIRST_SLEEP
        try:
            work = start()
            # Most collectives end sooner than the shortest sleep does. Yielding lets other
            # processes on this core run meanwhile.
            while not work.is_completed() and time.monotonic() < begun + _SPIN:
                os.sched_yield()
            while not work.is_completed():
                if time.monotonic() > begun + self._timeout:
                    raise RuntimeError(
                        f"it hangs, or is late by more than {self._timeout:g} s (`rank_timeout` "
                        "gives it longer)"
                    )
                time.sleep(pause)
                pause = min(1.5 * pause, _MAX_SLEEP)
            work.wait()
        except RuntimeError as fault:
            raise RankError(
                f"another rank is lost: {str(fault).splitlines()[0]} (this rank was at "
                f"{self.location}; the output of torchrun says which rank ended badly)"
            ) from fault


# --- from torchrun's environment variables to the ranks of a run ---


def is_rank_0() -> bool:
    """Whether this process is rank 0, which alone writes to the terminal; true without torchrun."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def started_by_torchrun() -> bool:
    """Whether torchrun started this process, with at least one other.

    torchrun sets all four variables. A scheduler of a cluster may set RANK alone, so one is not
    enough.
    """
    values = [os.environ.get(name, "") for name in _VARIABLES]
    return all(values) and all(x.isdecimal() for x in values[:2]) and int(values[1]) > 1


@contextlib.contextmanager
def process_group(timeout: float | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started, for the length of a `with` block that all enter.

    `ranks` answers with them meanwhile. Processes that have joined already stay as they are, and
    so does a process that torchrun did not start.

    Args:
        timeout: Seconds after which a rank that is late for a collective call counts as lost; None
            for `DEFAULT_TIMEOUT`.

    Raises:
        ValueError: The timeout is not a finite number above 0, or torch.distributed is in use
            already.
        RankError: Inside the block, wherever this rank waits for one that is lost.
    """
    timeout = DEFAULT_TIMEOUT if timeout is None else timeout
    if not (math.isfinite(timeout) and timeout > 0):
        raise ValueError(f"the rank timeout is {timeout}; it must be a number of seconds above 0")
    if ranks().size > 1 or not started_by_torchrun():
        yield ranks()
        return
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed is in use already, and prunus sets up its own process group under "
            "torchrun; call destroy_process_group first, or start the program without torchrun"
        )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # torch's own timeout is longer than ours, which comes first and names the lost rank.
    torch_timeout = datetime.timedelta(seconds=2 * timeout + 60)
    store, rank, size = next(rendezvous("env://", timeout=torch_timeout))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=PrefixStore(f"prunus/{next(_group_numbers)}", store),
        rank=rank,
        world_size=size,
        timeout=torch_timeout,
    )
    try:
        with using(ProcessGroup(timeout)) as joined:
            yield joined
    except RankError:
        # Destroying a group that has lost a member would wait for that member.
        raise
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()
