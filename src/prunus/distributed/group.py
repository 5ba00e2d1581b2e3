"""Ranks over a process group of torch: gloo between processors, nccl between CUDA devices.

Every operation is started in the background and looked at until it is done, so that a rank that is lost ends the waiting;
see `watch.py`. What carries names and texts is JSON and plain bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from prunus.distributed.base import OtherRankError, RankError, split_range
from prunus.distributed.heartbeat import Heartbeat

__all__ = ["ProcessGroup"]

_DTYPES = {str(dtype): dtype for dtype in torch.__dict__.values() if isinstance(dtype, torch.dtype)}
_LONGEST_PAUSE = 1e-3
# Seconds of a meeting that are spent awake.
_AWAKE = 1e-3
# Bytes that say how long a text is, and bytes of it that are sent along.
_LENGTH, _SHORT_TEXT = 8, 248


class ProcessGroup:
    """The ranks of a run; see `Ranks` for what each call gives. The process group is torch's default one."""

    def __init__(self, watch: Heartbeat) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.on_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._watch = watch
        #: Whether the error that ends this rank is one that all ranks have heard of already.
        self.told = False

    def own_range(self, count: int, together: int = 1) -> range:
        return split_range(count, self.size, together)[self.rank]

    def set_location(self, place: str) -> None:
        self._watch.place = place

    def gather_ints(self, numbers: Sequence[int]) -> list[list[int]]:
        mine = torch.tensor(list(numbers), dtype=torch.int64)
        return [x.tolist() for x in self._gather(mine)]

    def gather_text(self, text: str) -> list[str]:
        # A short text goes along with its length.
        data = text.encode()
        short = len(data).to_bytes(_LENGTH, "little") + data[:_SHORT_TEXT].ljust(_SHORT_TEXT, b"\0")
        found = [
            bytes(x.tolist())
            for x in self._gather(torch.frombuffer(bytearray(short), dtype=torch.uint8))
        ]
        lengths = [int.from_bytes(each[:_LENGTH], "little") for each in found]
        if max(lengths) > _SHORT_TEXT:
            rest = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
            return [bytes(x.tolist()).decode() for x in self._gather_uneven(rest, lengths)]
        return [each[_LENGTH:][:n].decode() for each, n in zip(found, lengths, strict=True)]

    def sum_floats(self, numbers: Sequence[float]) -> list[float]:
        parts = self._gather(torch.tensor(list(numbers), dtype=torch.float64))
        return [sum(each) for each in zip(*(x.tolist() for x in parts), strict=True)]

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._wait(lambda: dist.all_reduce(tensor, async_op=True))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        if tensor.numel():  # as bytes, for not every dtype can travel
            data = tensor.view(-1).view(torch.uint8)
            self._wait(lambda: dist.broadcast(data, src=source, async_op=True))

    def all_gather(
        self, tensor: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        return torch.cat(self._gather_uneven(tensor.contiguous(), lengths))

    def claim(self, what: str, count: int) -> Iterator[int]:
        while (number := self._watch.claim(what)) < count:
            yield number

    def barrier(self, what: str) -> None:
        self.set_location(f"the end of {what}")
        for rank in self._watch.arrivals(what):
            while not self._watch.has_arrived(what, rank):
                self._watch.check()
                time.sleep(0.1)

    def on_rank_0(self, make: Callable[[], Any]) -> Any:
        text = ""
        with self.fail_together():
            if self.rank == 0:
                text = json.dumps(make())
        return json.loads(self._bytes_from_rank_0(text.encode()).decode())

    def tensors_from_rank_0(
        self, make: Callable[[], Mapping[str, torch.Tensor]]
    ) -> Mapping[str, torch.Tensor]:
        found: Mapping[str, torch.Tensor] = {}

        def describe() -> list[Any]:
            nonlocal found
            found = {name: x.detach().cpu().contiguous() for name, x in make().items()}
            return [[name, str(x.dtype), list(x.shape)] for name, x in found.items()]

        described = self.on_rank_0(describe)
        received = {}
        for name, dtype, shape in described:
            x = found[name] if self.rank == 0 else torch.empty(shape, dtype=_DTYPES[dtype])
            self.broadcast(x, 0)
            received[name] = x
        return received

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        fault: Exception | None = None
        try:
            yield
        except RankError:
            raise
        except Exception as raised:
            fault = raised
        said = self.gather_text("" if fault is None else f"{type(fault).__name__}: {fault}")
        self.told = any(said)
        if self.rank > 0 and said[0]:
            raise OtherRankError(said[0]) from fault
        if fault is not None:
            raise fault
        for rank, text in enumerate(said):
            if text:
                raise RankError(f"rank {rank} stopped: {text}")

    def _bytes_from_rank_0(self, data: bytes) -> bytes:
        length = self.gather_ints([len(data)])[0][0]
        buffer = torch.zeros(length, dtype=torch.uint8)
        if self.rank == 0 and length:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.broadcast(buffer, 0)
        return buffer.numpy().tobytes()

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Everybody's tensor of this shape."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(found, tensor, async_op=True))
        return found

    def _gather_uneven(
        self, tensor: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Everybody's tensor (n, …); bytes travel, padded to the longest, for not every dtype can."""
        if lengths is None:
            lengths = [numbers[0] for numbers in self.gather_ints([len(tensor)])]
        longest = max(lengths)
        if not longest:
            return [tensor.new_empty((n, *tensor.shape[1:])) for n in lengths]
        padded = tensor
        if len(tensor) < longest:
            padded = tensor.new_zeros((longest, *tensor.shape[1:]))
            padded[: len(tensor)] = tensor
        parts = self._gather(padded.reshape(-1).view(torch.uint8))
        return [
            part.view(tensor.dtype).view(longest, *tensor.shape[1:])[:n]
            for part, n in zip(parts, lengths, strict=True)
        ]

    def _wait(self, start: Callable[[], Any]) -> None:
        """One meeting: until it is done, or a rank is known to be lost."""
        self._watch.meeting += 1
        begun, pause = time.monotonic(), 2e-5
        try:
            work = start()
            # Most meetings are over sooner than the shortest sleep; others on this core may run meanwhile.
            while not work.is_completed() and time.monotonic() < begun + _AWAKE:
                os.sched_yield()
            while not work.is_completed():
                self._watch.check(begun)
                time.sleep(pause)
                pause = min(1.5 * pause, _LONGEST_PAUSE)
            work.wait()
        except RankError:
            raise
        except RuntimeError as fault:  # a connection that broke
            raise self._watch.explain(
                f"{self._watch.place}: {str(fault).splitlines()[0]}"
            ) from fault
