"""Which linears' inputs may change places, because whoever writes them can follow: an order folded into the weights.

A linear's inputs can be reordered without a trace in the model's outputs if the rows that produce them are reordered
alike and nothing in between tells channels apart: the inner channels of an MLP (rows of gate and up, columns of down),
and within a head from v to o. Heads that share keys and values share their v, so they must share one order. What reads
the residual stream cannot be reordered, since all blocks share that.

`find_folds` guesses from names and shapes; `holds` tries a guess on the dense block with real hidden states, and
nothing is folded that did not pass. Whatever else may lie between two linears (a norm with weights, another order of
heads) fails there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.methods.refine.permutation import Channels
from prunus.model.calls import replaced_forward
from prunus.model.linears import Linear

__all__ = ["REFUSED", "Fold", "find_folds", "fold", "holds", "inputs_permuted"]

#: What the manifest says of a linear whose inputs keep their order.
REFUSED = "its inputs keep their order: nothing that writes them could follow without changing the model's outputs"

_VALUES = ("v_proj", "v", "value", "value_proj")
_QUERIES_AND_KEYS = ("q_proj", "k_proj", "q", "k", "query", "key", "query_proj", "key_proj")
# A wrong order changes a linear's outputs by about their own size, rounding by less than a hundredth of it.
_MOST_CHANGE = 0.05


@dataclass(frozen=True)
class Producer:
    """A linear that writes the inputs of another: its row `rows_CGW[c, g, d]` gives channel d of group g, in copy c."""

    name: str
    rows_CGW: Tensor


@dataclass(frozen=True)
class Fold:
    """A linear whose inputs can change places, and the linears that follow.

    Attributes:
        consumer: relative name of the linear.
        producers: of its inputs.
        channels: which of its inputs can change places with which.
    """

    consumer: str
    producers: tuple[Producer, ...]
    channels: Channels


def find_folds(linears: Sequence[Linear], heads: int | None, m: int) -> dict[str, list[Fold]]:
    """Relative name of a linear -> what might be folded, likeliest first; nothing for what reads the residual stream.

    Args:
        linears: all of a block.
        heads: of its attention, where known.
        m: channels of a group of N:M, which must divide those that may change places.
    """
    families: dict[str, list[Linear]] = {}
    for linear in linears:
        families.setdefault(linear.name.rpartition(".")[0], []).append(linear)
    found: dict[str, list[Fold]] = {}
    for family in families.values():
        for consumer in family:
            guesses = [
                *_mlp(consumer, family),
                *(_attention(consumer, family, heads) if heads else ()),
            ]
            guesses = [guess for guess in guesses if guess.channels.width % m == 0]
            if guesses:
                found[consumer.name] = guesses
    return found


def _mlp(consumer: Linear, family: Sequence[Linear]) -> list[Fold]:
    """Up and perhaps gate, apart or (gate, up) in one, before down."""
    out, width = consumer.shape
    others = [linear for linear in family if linear is not consumer]
    writers = [other for other in others if other.shape == (width, out)]
    fused = [other for other in others if other.shape == (2 * width, out)]
    rows = torch.arange(width)
    channels = Channels(1, 1, width)
    guesses = []
    # By its shape up could as well read what down writes; what writes is registered first.
    after = all(consumer in family[family.index(writer) :] for writer in writers)
    if writers == others and (len(others) == 2 or (len(others) == 1 and after)) and width != out:
        producers = tuple(Producer(writer.name, rows.view(1, 1, width)) for writer in writers)
        guesses.append(Fold(consumer.name, producers, channels))
    for writer in fused:
        both = torch.stack([rows, width + rows]).view(2, 1, width)
        guesses.append(Fold(consumer.name, (Producer(writer.name, both),), channels))
    return guesses


def _attention(consumer: Linear, family: Sequence[Linear], heads: int) -> list[Fold]:
    """Values, apart or at the end of, or per head in, one linear with queries and keys, before the output projection."""
    width, rest = divmod(consumer.shape[1], heads)
    if rest or not width or consumer.name.rpartition(".")[2] in (*_VALUES, *_QUERIES_AND_KEYS):
        return []
    guesses = []

    def guess(writer: Linear, rows_GW: Tensor) -> None:
        groups = len(rows_GW)
        if 1 <= groups <= heads and heads % groups == 0:
            channels = Channels(groups, heads // groups, width)
            guesses.append(Fold(consumer.name, (Producer(writer.name, rows_GW[None]),), channels))

    for writer in (linear for linear in family if linear is not consumer):
        rows = writer.shape[0]
        if rows % width:
            continue
        if writer.name.rpartition(".")[2] in _VALUES:
            guess(writer, torch.arange(rows).view(-1, width))
        elif len(family) == 2 and rows > heads * width and (rows // width - heads) % 2 == 0:
            groups = (rows // width - heads) // 2
            guess(writer, torch.arange(rows)[rows - groups * width :].view(-1, width))
            if groups == heads:
                guess(writer, torch.arange(rows).view(heads, 3, width)[:, 2])
    return guesses


def holds(guess: Fold, linears: Mapping[str, Linear], run: Callable[[], Tensor]) -> bool:
    """Whether the block gives the same outputs with the inputs of `guess.consumer` in some other order.

    Args:
        guess: from `find_folds`.
        linears: by relative name, with the dense weights; they end as they began.
        run: runs the block on hidden states and returns its outputs.
    """
    generator = torch.Generator().manual_seed(0)
    within_GW = torch.stack(
        [
            torch.randperm(guess.channels.width, generator=generator)
            for _ in range(guess.channels.groups)
        ]
    )
    touched = [
        linears[name].module for name in (guess.consumer, *(p.name for p in guess.producers))
    ]
    before = [
        {name: p.detach().clone() for name, p in module.named_parameters()} for module in touched
    ]
    consumer = linears[guess.consumer]
    plain = _outputs(consumer, run)
    if len(plain) == 1:
        return False  # an expert that no token of these reaches proves nothing
    try:
        for module, values in zip(touched, before, strict=True):
            tensors = {
                f"{_name_of(module, linears)}.{name}": value for name, value in values.items()
            }
            for key, tensor in fold(
                tensors, guess, guess.channels.spread(within_GW), linears
            ).items():
                module.get_parameter(key.rpartition(".")[2]).copy_(tensor)
        ordered = _outputs(consumer, run)
    finally:
        for module, values in zip(touched, before, strict=True):
            for name, value in values.items():
                module.get_parameter(name).copy_(value)
    return len(plain) == len(ordered) and all(
        float((after - was).norm()) <= _MOST_CHANGE * float(was.norm())
        for was, after in zip(plain, ordered, strict=True)
    )


def fold(
    tensors: Mapping[str, Tensor], chosen: Fold, order_I: Tensor, linears: Mapping[str, Linear]
) -> dict[str, Tensor]:
    """What changes of `tensors` (by relative name, as stored) when the consumer's inputs take the order `order_I`."""
    changed: dict[str, Tensor] = {}
    key = f"{chosen.consumer}.weight"
    if key in tensors:
        dim = 0 if linears[chosen.consumer].transposed else 1
        changed[key] = tensors[key].index_select(dim, order_I.to(tensors[key].device))
    within_GW = chosen.channels.within(order_I)
    for producer in chosen.producers:
        rows_CGW = producer.rows_CGW
        from_CGW = rows_CGW.gather(2, within_GW.expand_as(rows_CGW))
        for key, dim in (
            (f"{producer.name}.weight", 1 if linears[producer.name].transposed else 0),
            (f"{producer.name}.bias", 0),
        ):
            if key not in tensors:
                continue
            order_O = torch.arange(tensors[key].shape[dim])
            order_O[rows_CGW.flatten()] = from_CGW.flatten()
            changed[key] = tensors[key].index_select(dim, order_O.to(tensors[key].device))
    return changed


def _name_of(module: nn.Module, linears: Mapping[str, Linear]) -> str:
    return next(name for name, linear in linears.items() if linear.module is module)


@torch.no_grad()
def _outputs(consumer: Linear, run: Callable[[], Tensor]) -> list[Tensor]:
    """What the consumer gives, each time it is called, and what the block gives; float32."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        seen.append(output.float())

    handle = consumer.module.register_forward_hook(keep)
    try:
        output = run()
        seen.append(output.float())
    finally:
        handle.remove()
    return seen


@contextlib.contextmanager
def inputs_permuted(linears: Sequence[Linear]) -> Iterator[Callable[[Linear, torch.Tensor], None]]:
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
            stack.enter_context(replaced_forward(linear.module, wrapped(linear)))
        yield put
