"""Reorders the inputs of a linear, and folds the permutation into the weights that write them.

N:M keeps the best N of every M consecutive inputs, so the order of the inputs matters. It can
change without a trace in the model's outputs if the rows that write the inputs change places alike:

    rows of up and gate   ──►  inner channels of the MLP  ──►  columns of down
    rows of v             ──►  channels of a head         ──►  columns of the output projection

Nothing in between may tell channels apart. Heads that share their keys and values share one v, so
they share one order. Linears that read the residual stream keep their order, because all blocks
share that stream.

`find_permutable` guesses from names and shapes. `choose_permutable` tries every guess on the dense
block with real hidden states, and only a guess that passes is used. Whatever else may lie between
two linears (a norm with weights, another order of heads) fails there.

Shape suffixes: O outputs (rows), I inputs (columns). For channels that can change places: G groups,
W channels of a group, C copies (rows of one producer that write the same channel).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.distributed import Ranks
from prunus.methods.refine.permutation import Channels
from prunus.model.calls import replaced_forward
from prunus.model.linears import Linear

__all__ = [
    "KEPT_ORDER",
    "PermutableInputs",
    "Producer",
    "choose_permutable",
    "find_permutable",
    "fold_permutation",
    "inputs_permuted",
    "keeps_outputs",
]

#: The manifest's note on a linear whose inputs keep their order.
KEPT_ORDER = "its inputs keep their order: any other would change the model's outputs"

_VALUES = ("v_proj", "v", "value", "value_proj")
_QUERIES_AND_KEYS = ("q_proj", "k_proj", "q", "k", "query", "key", "query_proj", "key_proj")
# A wrong order changes a linear's outputs by about their own size, rounding by less than 1 %.
_MAX_CHANGE = 0.05


@dataclass(frozen=True)
class Producer:
    """A linear that writes the inputs of another.

    Attributes:
        name: relative to the block.
        rows_CGW: its row `rows_CGW[c, g, w]` writes channel w of group g, in copy c.
    """

    name: str
    rows_CGW: Tensor


@dataclass(frozen=True)
class PermutableInputs:
    """A linear whose inputs can change places, and the linears that write them.

    Attributes:
        consumer: relative name of the linear.
        producers: the linears that write its inputs.
        channels: which of its inputs can change places with which.
    """

    consumer: str
    producers: tuple[Producer, ...]
    channels: Channels


def find_permutable(
    linears: Sequence[Linear], heads: int | None, m: int
) -> dict[str, list[PermutableInputs]]:
    """Guess from names and shapes which linears' inputs can be permuted.

    Args:
        linears: all linears of a block.
        heads: attention heads of the block, if known.
        m: group size of N:M. It must divide the number of channels that can change places.

    Returns:
        Relative name of a linear -> guesses, the likeliest first. Linears that read the residual
        stream are missing.

    >>> up, down = Linear("up", nn.Linear(2, 8)), Linear("down", nn.Linear(8, 2))
    >>> [guess.producers[0].name for guess in find_permutable([up, down], None, 4)["down"]]
    ['up']
    """
    # Linears of one submodule, such as an attention or an MLP, can write each other's inputs.
    siblings: dict[str, list[Linear]] = {}
    for linear in linears:
        siblings.setdefault(linear.name.rpartition(".")[0], []).append(linear)
    found: dict[str, list[PermutableInputs]] = {}
    for family in siblings.values():
        for consumer in family:
            guesses = [
                *_mlp_guesses(consumer, family),
                *(_attention_guesses(consumer, family, heads) if heads else ()),
            ]
            guesses = [guess for guess in guesses if guess.channels.width % m == 0]
            if guesses:
                found[consumer.name] = guesses
    return found


def _mlp_guesses(consumer: Linear, family: Sequence[Linear]) -> list[PermutableInputs]:
    """Down as consumer; as producers up and perhaps gate, or one linear that holds (gate, up)."""
    out, width = consumer.shape
    others = [linear for linear in family if linear is not consumer]
    separate = [other for other in others if other.shape == (width, out)]
    fused = [other for other in others if other.shape == (2 * width, out)]
    rows = torch.arange(width)
    channels = Channels(1, 1, width)
    guesses = []
    # By shapes alone, up might as well be the consumer of down. Producers are registered first.
    after = all(consumer in family[family.index(writer) :] for writer in separate)
    if separate == others and (len(others) == 2 or (len(others) == 1 and after)) and width != out:
        producers = tuple(Producer(writer.name, rows.view(1, 1, width)) for writer in separate)
        guesses.append(PermutableInputs(consumer.name, producers, channels))
    for writer in fused:
        # Gate and up in one linear: channel w is written by row w and by row width + w.
        both = torch.stack([rows, width + rows]).view(2, 1, width)
        guesses.append(PermutableInputs(consumer.name, (Producer(writer.name, both),), channels))
    return guesses


def _attention_guesses(
    consumer: Linear, family: Sequence[Linear], heads: int
) -> list[PermutableInputs]:
    """The output projection as consumer; as producer the values.

    Values are a linear of their own, or share one with queries and keys: either after all queries
    and keys, or head by head.
    """
    width, rest = divmod(consumer.shape[1], heads)
    if rest or not width or consumer.name.rpartition(".")[2] in (*_VALUES, *_QUERIES_AND_KEYS):
        return []
    guesses = []

    def guess(writer: Linear, rows_GW: Tensor) -> None:
        groups = len(rows_GW)
        if 1 <= groups <= heads and heads % groups == 0:
            channels = Channels(groups, heads // groups, width)
            producers = (Producer(writer.name, rows_GW[None]),)
            guesses.append(PermutableInputs(consumer.name, producers, channels))

    for writer in (linear for linear in family if linear is not consumer):
        rows = writer.shape[0]
        if rows % width:
            continue
        if writer.name.rpartition(".")[2] in _VALUES:
            # A linear of its own. With fewer rows than the consumer has inputs, heads share them.
            guess(writer, torch.arange(rows).view(-1, width))
        elif len(family) == 2 and rows > heads * width and (rows // width - heads) % 2 == 0:
            # All queries (one per head), then as many keys as values.
            groups = (rows // width - heads) // 2
            guess(writer, torch.arange(rows)[rows - groups * width :].view(-1, width))
            if groups == heads:
                # The same number of rows may also be (query, key, value) of one head after another.
                guess(writer, torch.arange(rows).view(heads, 3, width)[:, 2])
    return guesses


def choose_permutable(
    guesses: Mapping[str, Sequence[PermutableInputs]],
    linears: Mapping[str, Linear],
    run: Callable[[], Tensor] | None,
    ranks: Ranks,
) -> dict[str, PermutableInputs]:
    """Choose for every linear the first guess that keeps the block's outputs. All ranks call it.

    Args:
        guesses: from `find_permutable`.
        linears: all linears of the block by relative name, with the dense weights.
        run: runs the block on the first batch of all; None on the ranks that do not have it.
        ranks: the processes of the run.

    Returns:
        Relative name of a linear -> the guess; linears without a guess that holds are missing.
    """
    own: dict[str, int] = {}
    if run is not None:
        for name, each in guesses.items():
            passing = (i for i, guess in enumerate(each) if keeps_outputs(guess, linears, run))
            if (chosen := next(passing, None)) is not None:
                own[name] = chosen
    # Only one rank has the first batch. It tells the others which guesses passed.
    rows = [json.loads(text) for text in ranks.gather_text(json.dumps(own))]
    return {name: guesses[name][chosen] for row in rows for name, chosen in row.items()}


@torch.no_grad()
def keeps_outputs(
    guess: PermutableInputs, linears: Mapping[str, Linear], run: Callable[[], Tensor]
) -> bool:
    """Whether the block gives the same outputs with the consumer's inputs in a random order.

    Args:
        guess: from `find_permutable`.
        linears: by relative name, with the dense weights. They end with the same weights.
        run: runs the block on hidden states and returns its outputs.
    """
    # A generator of its own: the test must not change the random numbers of the run.
    generator = torch.Generator().manual_seed(0)
    orders = [
        torch.randperm(guess.channels.width, generator=generator)
        for _ in range(guess.channels.groups)
    ]
    order_I = guess.channels.spread(torch.stack(orders))
    names = (guess.consumer, *(producer.name for producer in guess.producers))
    parameters = {
        f"{name}.{key}": parameter
        for name in names
        for key, parameter in linears[name].module.named_parameters()
    }
    dense = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    consumer = linears[guess.consumer]
    before = _outputs(consumer, run)
    if len(before) == 1:
        return False  # no token reached this linear (an expert), so the test would prove nothing
    try:
        for key, tensor in fold_permutation(dense, guess, order_I, linears).items():
            parameters[key].copy_(tensor)
        after = _outputs(consumer, run)
    finally:
        for key, tensor in dense.items():
            parameters[key].copy_(tensor)
    return len(before) == len(after) and all(
        float((new - old).norm()) <= _MAX_CHANGE * float(old.norm())
        for old, new in zip(before, after, strict=True)
    )


def fold_permutation(
    tensors: Mapping[str, Tensor],
    permutable: PermutableInputs,
    order_I: Tensor,
    linears: Mapping[str, Linear],
) -> dict[str, Tensor]:
    """Reorder a linear's inputs in the stored tensors of a block.

    Args:
        tensors: tensors of the block by relative name, as stored.
        permutable: the linear, and the linears that write its inputs.
        order_I: int64 (I,). Input j of the result is input `order_I[j]` of `tensors`.
        linears: all linears of the block by relative name.

    Returns:
        The tensors that change, by relative name.
    """
    changed: dict[str, Tensor] = {}
    key = f"{permutable.consumer}.weight"
    if key in tensors:
        dim = 0 if linears[permutable.consumer].transposed else 1
        changed[key] = tensors[key].index_select(dim, order_I.to(tensors[key].device))
    # A producer's rows move as the consumer's inputs do: the row that writes the channel's new
    # place is the row that wrote the channel.
    within_GW = permutable.channels.within(order_I)
    for producer in permutable.producers:
        rows_CGW = producer.rows_CGW
        from_CGW = rows_CGW.gather(2, within_GW.expand_as(rows_CGW))
        for key, dim in (
            (f"{producer.name}.weight", 1 if linears[producer.name].transposed else 0),
            (f"{producer.name}.bias", 0),
        ):
            if key not in tensors:
                continue
            # Rows that write other channels (queries, keys) keep their places.
            order_O = torch.arange(tensors[key].shape[dim])
            order_O[rows_CGW.flatten()] = from_CGW.flatten()
            changed[key] = tensors[key].index_select(dim, order_O.to(tensors[key].device))
    return changed


def _outputs(consumer: Linear, run: Callable[[], Tensor]) -> list[Tensor]:
    """The consumer's output in each of its calls, then the block's; float32."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs.append(output.float())

    handle = consumer.module.register_forward_hook(keep)
    try:
        outputs.append(run().float())
    finally:
        handle.remove()
    return outputs


@contextlib.contextmanager
def inputs_permuted(linears: Sequence[Linear]) -> Iterator[Callable[[Linear, Tensor], None]]:
    """Let linears take their inputs in another order before it is folded into the producers.

    While active, every call of the yielded function `permute(linear, order_I)` reorders the columns
    of the linear's weight, and from then on the linear reorders its inputs alike. At the end the
    weight stays reordered and the inputs no longer are. Linears beside `linears` are left alone.
    """
    names = {linear.name for linear in linears}
    orders: dict[str, Tensor] = {}

    def permute(linear: Linear, order_I: Tensor) -> None:
        if linear.name in names:
            orders[linear.name] = order_I.to(linear.parameter.device)
            linear.assign(linear.weight_OI[:, orders[linear.name]])

    def permuted_forward(linear: Linear) -> Callable[[Tensor], Tensor]:
        plain = linear.module.forward

        def forward(x: Tensor) -> Tensor:
            order_I = orders.get(linear.name)
            result: Tensor = plain(x if order_I is None else x.index_select(-1, order_I))
            return result

        return forward

    with contextlib.ExitStack() as stack:
        for linear in linears:
            stack.enter_context(replaced_forward(linear.module, permuted_forward(linear)))
        yield permute
