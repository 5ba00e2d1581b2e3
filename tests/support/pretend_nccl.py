"""A process group for pretend CUDA devices, which takes what NCCL takes.

Tensors of a collective must all be on the device of the rank, and no two ranks may have the same
device. They travel over gloo, by way of the host. Tensors of the processor go to gloo directly, as
in a group whose backend is `cpu:gloo,cuda:nccl`.
"""

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, _create_work_from_future
from torch.futures import Future

#: The name of the backend, in place of "nccl".
NAME = "pretend"


class _Group(dist.ProcessGroup):
    def __init__(self, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._checked = False

    def getBackendName(self) -> str:
        return NAME

    def size(self) -> int:
        return self._size

    def allreduce(self, tensors: Sequence[torch.Tensor], options: Any) -> Any:
        return self._run(tensors, lambda host: self._gloo.allreduce(host, options))

    def broadcast(self, tensors: Sequence[torch.Tensor], options: Any) -> Any:
        return self._run(tensors, lambda host: self._gloo.broadcast(host, options))

    def allgather(
        self,
        outputs: Sequence[Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor],
        options: Any,
    ) -> Any:
        [output], [given] = outputs, inputs
        return self._run(
            [*output, given], lambda host: self._gloo.allgather([host[:-1]], [host[-1]], options)
        )

    def _run(self, tensors: Sequence[torch.Tensor], start: Any) -> Any:
        if all(tensor.device.type == "cpu" for tensor in tensors):
            return start(list(tensors))
        own = torch.device("cuda", torch.cuda.current_device())
        for tensor in tensors:
            if tensor.device != own:
                raise RuntimeError(
                    f"Tensors must be CUDA and dense, on the device of the rank ({own}); one is on "
                    f"{tensor.device}"
                )
            if not tensor.is_contiguous():
                raise ValueError("Tensors must be contiguous")
        self._check_devices(own.index)
        host = [tensor.cpu() for tensor in tensors]
        start(host).wait()
        for tensor, received in zip(tensors, host, strict=True):
            tensor.copy_(received)
        done: Future[Any] = Future()
        done.set_result(list(tensors))
        return _create_work_from_future(done)

    def _check_devices(self, own: int) -> None:
        if self._checked:
            return
        self._checked = True
        found = [torch.zeros(1, dtype=torch.int64) for _ in range(self._size)]
        given = torch.tensor([own])
        self._gloo.allgather([found], [given], AllgatherOptions()).wait()
        if len({int(each) for each in found}) < self._size:
            raise RuntimeError(f"Duplicate GPU detected: several ranks are on CUDA device {own}")


def _create(store: Any, rank: int, size: int, timeout: datetime.timedelta) -> _Group:
    return _Group(store, rank, size, timeout)


dist.Backend.register_backend(NAME, _create, devices=["cuda"])
