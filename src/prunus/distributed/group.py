"""`Ranks` over a process group of torch: gloo between CPUs, NCCL between CUDA devices.

torch's own collectives wait for ever, or for one fixed time, when a rank is lost. So every
collective starts in the background here, and this rank checks it and the heartbeats of the others
in turn: a lost rank then ends the waiting with an error that names it (see `heartbeat.py`).

Texts travel as bytes and other values as JSON. Nothing is pickled: a pickle can run code.
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

from prunus.distributed.base import OtherRankError, RankError, Ranks
from prunus.distributed.heartbeat import Heartbeat

_DTYPES = {str(dtype): dtype for dtype in torch.__dict__.values() if isinstance(dtype, torch.dtype)}
_MAX_SLEEP = 1e-3  # seconds between two looks at a collective
_SPIN = 1e-3  # seconds in which a rank that waits does not sleep
# A text travels with its length in one message of 256 bytes; a longer one needs a second message.
_LENGTH_BYTES, _SHORT_TEXT = 8, 248


class ProcessGroup(Ranks):
    """The ranks of a run over torch's default process group; see `Ranks` for each call.

    Attributes:
        error_reported: whether all ranks know already of the error that ends this rank.
    """

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.error_reported = False
        self._heartbeat = heartbeat

    def set_location(self, location: str) -> None:
        self._heartbeat.location = location

    def gather_ints(self, numbers: Sequence[int]) -> list[list[int]]:
        own = torch.tensor(list(numbers), dtype=torch.int64)
        return [x.tolist() for x in self._gather(own)]

    def gather_text(self, text: str) -> list[str]:
        data = text.encode()
        message = len(data).to_bytes(_LENGTH_BYTES, "little")
        message += data[:_SHORT_TEXT].ljust(_SHORT_TEXT, b"\0")
        found = [
            bytes(x.tolist())
            for x in self._gather(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        ]
        lengths = [int.from_bytes(each[:_LENGTH_BYTES], "little") for each in found]
        if max(lengths) > _SHORT_TEXT:
            # frombuffer refuses an empty buffer, so an empty text starts from one byte.
            whole = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
            return [bytes(x.tolist()).decode() for x in self._gather_uneven(whole, lengths)]
        return [each[_LENGTH_BYTES:][:n].decode() for each, n in zip(found, lengths, strict=True)]

    def sum_floats(self, numbers: Sequence[float]) -> list[float]:
        parts = self._gather(torch.tensor(list(numbers), dtype=torch.float64))
        return [sum(each) for each in zip(*(x.tolist() for x in parts), strict=True)]

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._wait(lambda: dist.all_reduce(tensor, async_op=True))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        if tensor.numel():
            # As bytes: gloo and NCCL do not carry every dtype.
            data = tensor.view(-1).view(torch.uint8)
            self._wait(lambda: dist.broadcast(data, src=source, async_op=True))

    def all_gather(
        self, tensor: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        return torch.cat(self._gather_uneven(tensor.contiguous(), lengths))

    def claim(self, what: str, count: int) -> Iterator[int]:
        while (number := self._heartbeat.claim(what)) < count:
            yield number

    def barrier(self, what: str) -> None:
        # Over the store rather than by a collective, which would apply the rank timeout to ranks
        # that still work.
        self.set_location(f"the end of {what}")
        self._heartbeat.set_finished(what)
        for rank in self._heartbeat.others:
            while not self._heartbeat.has_finished(what, rank):
                self._heartbeat.check()
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
        made: Mapping[str, torch.Tensor] = {}

        def describe() -> list[Any]:
            nonlocal made
            made = {name: x.detach().cpu().contiguous() for name, x in make().items()}
            return [[name, str(x.dtype), list(x.shape)] for name, x in made.items()]

        # Names, dtypes and shapes go first, so that the others can allocate what they receive.
        described = self.on_rank_0(describe)
        received = {}
        for name, dtype, shape in described:
            x = made[name] if self.rank == 0 else torch.empty(shape, dtype=_DTYPES[dtype])
            self.broadcast(x, 0)
            received[name] = x
        return received

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        error: Exception | None = None
        try:
            yield
        except RankError:
            # A rank is lost: the others cannot take part in the exchange below.
            raise
        except Exception as raised:
            error = raised
        texts = self.gather_text("" if error is None else f"{type(error).__name__}: {error}")
        self.error_reported = any(texts)
        if self.rank > 0 and texts[0]:
            raise OtherRankError(texts[0]) from error
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
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
        """The tensors of all ranks, which have the same shape."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(found, tensor, async_op=True))
        return found

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
        """Run one collective: wait until it is done, or until a rank is known to be lost."""
        self._heartbeat.collectives += 1
        begun, pause = time.monotonic(), 2e-5
        try:
            work = start()
            # Most collectives end sooner than the shortest sleep does. Yielding lets other
            # processes on this core run meanwhile.
            while not work.is_completed() and time.monotonic() < begun + _SPIN:
                os.sched_yield()
            while not work.is_completed():
                self._heartbeat.check(begun)
                time.sleep(pause)
                pause = min(1.5 * pause, _MAX_SLEEP)
            work.wait()
        except RankError:
            raise
        except RuntimeError as fault:  # a connection broke
            raise self._heartbeat.lost_rank_error(
                f"{self._heartbeat.location}: {str(fault).splitlines()[0]}"
            ) from fault
