"""Linears that are given their inputs in one order and take them in the one in which their weights will be stored.

With `--permute`, a linear's inputs take another order once it is pruned, and whoever writes them will write them in that
order. Batches that wait before the linear have theirs in the old one. They are put in order on their way in, so that the
linear's sums are those of the finished block to the bit, and what runs behind it need not be run again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from prunus.engine.tail import in_place_of
from prunus.model.linears import Linear

__all__ = ["in_stored_order"]


@contextlib.contextmanager
def in_stored_order(linears: Sequence[Linear]) -> Iterator[Callable[[Linear, torch.Tensor], None]]:
    """While active: a function that puts the inputs of one of `linears` in an order, int64 (in,), from then on.

    It puts the columns of the linear's weight in that order too, and leaves them there. Other linears it leaves alone.
    """
    known = {linear.name for linear in linears}
    orders: dict[str, torch.Tensor] = {}

    def put(linear: Linear, order_I: torch.Tensor) -> None:
        if linear.name in known:
            orders[linear.name] = order_I.to(linear.parameter.device)
            linear.assign(linear.weight_OI[:, orders[linear.name]])

    def wrapped(linear: Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        plain = linear.module.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            order_I = orders.get(linear.name)
            result: torch.Tensor = plain(x if order_I is None else x.index_select(-1, order_I))
            return result

        return forward

    with contextlib.ExitStack() as stack:
        for linear in linears:
            stack.enter_context(in_place_of(linear.module, wrapped(linear)))
        yield put
