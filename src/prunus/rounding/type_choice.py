"""The type of each weight: the least loss within a sum of bytes, and within a sum of times.

Measurement     what is measured before the first block, and lasts until the run is finished
Choice          a type that a weight can have, with its bytes, its loss and its time
choose_types    one `Choice` for each weight
TypeChoice      how each weight is rounded in the end
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from torch import Tensor

from prunus.rounding.group_quantizer import GroupQuantizer
from prunus.rounding.group_sweep import GroupRounding

# The search for the price of time: the factor by which it is raised, the most times it is raised,
# and how many times the interval that has the price is halved then.
_DEARER, _RAISES, _HALVINGS = 8.0, 10, 6


@dataclass(frozen=True)
class Measurement:
    """What decides the types of a run and is stored until the run is finished.

    Attributes:
        losses: First module of each weight -> the loss that each of its types adds, (types,).
        importances: First module of a weight outside the blocks -> how much errors in each of its
            columns raise the loss, float32 (I,). With feedback this leaves out what errors of the
            head cost as the head. Where each weight is rounded by itself, also name of a linear ->
            the mean square of each of its inputs.
        placements: Name -> where the rows of a template are in the checkpoint; see
            `gguf/template.py`.
        copied: The hash of what is copied from a template -> an empty value.
    """

    losses: Mapping[str, Tensor] = field(default_factory=dict)
    importances: Mapping[str, Tensor] = field(default_factory=dict)
    placements: Mapping[str, Tensor] = field(default_factory=dict)
    copied: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by names that begin with the name of their field, as a file stores them."""
        return {
            f"{each.name}/{key}": tensor
            for each in fields(self)
            for key, tensor in getattr(self, each.name).items()
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Measurement:
        """The inverse of `tensors`.

        Raises:
            ValueError: A name begins with no field.

        >>> Measurement.of({"losses/a": 0.5}).tensors()
        {'losses/a': 0.5}
        >>> Measurement.of({"bits/a": 0.5})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: the measurement of an unfinished run has 'bits/a', which ...
        """
        by_field = defaultdict[str, dict[str, Tensor]](dict)
        for name, tensor in tensors.items():
            kind, _, key = name.partition("/")
            if kind not in cls.__dataclass_fields__:
                raise ValueError(
                    f"the measurement of an unfinished run has {name[:80]!r}, which this version "
                    "does not know: choose `overwrite` to start again"
                )
            by_field[kind][key] = tensor
        return cls(**by_field)


class Choice(NamedTuple):
    """A type that a weight can have.

    Attributes:
        kind: The name of the type.
        nbytes: The bytes of the weight in the result.
        loss: What the type adds to the loss; 0 where that was not measured.
        time: What the weight takes for each token, in nanoseconds; 0 where that does not matter.
    """

    kind: str
    nbytes: int
    loss: float = 0.0
    time: float = 0.0


@dataclass(frozen=True)
class TypeChoice:
    """How each weight is rounded.

    Attributes:
        quantizers: Every module that has a type -> how its weight is rounded.
        importances: See `Measurement`.
    """

    quantizers: Mapping[str, GroupQuantizer]
    importances: Mapping[str, Tensor]

    def rounding(self, name: str) -> GroupRounding:
        """How a linear is rounded: to nearest if it has an importance, else with feedback."""
        return GroupRounding(self.quantizers[name], self.importances.get(name))

    @property
    def types(self) -> dict[str, str]:
        """Every module that has a type -> the name of the type, as the record has it."""
        return {name: quantizer.name for name, quantizer in self.quantizers.items()}


def choose_types(
    choices: Mapping[str, Sequence[Choice]], nbytes: int, time: float = math.inf
) -> dict[str, Choice]:
    """The types of least loss within `nbytes` that together take at most `time` for a token.

    For two sums to bound, each has its price (Lagrange). So the loss of a type gets what its time
    costs, and the smallest price for which the time is kept is searched for.

    Args:
        choices: Name of a weight -> the types that it can have.
        nbytes: The bytes of all weights together. Where even the smallest types take more, these
            are chosen.
        time: Nanoseconds of all weights together. Where no choice is as fast, the fastest one that
            was seen is taken.

    Returns:
        Name of a weight -> its type.

    >>> narrow, wide = Choice("Q3_K", 3, 9.0), Choice("Q6_K", 6, 1.0)
    >>> chosen = choose_types({"a": [narrow, wide], "b": [narrow, wide._replace(loss=5.0)]}, 9)
    >>> [choice.kind for choice in chosen.values()]
    ['Q6_K', 'Q3_K']
    >>> slow, fast = Choice("IQ4_XS", 4, 1.0, time=9.0), Choice("Q4_K", 4, 2.0, time=5.0)
    >>> chosen = choose_types({"a": [slow, fast], "b": [slow, fast._replace(loss=9.0)]}, 8, 14.0)
    >>> [choice.kind for choice in chosen.values()]
    ['Q4_K', 'IQ4_XS']
    """

    def chosen_at(price: float) -> tuple[float, dict[str, Choice]]:
        """The time of the types that are best at this price of a nanosecond, and the types."""
        chosen = _within(choices, nbytes, price)
        return sum(choice.time for choice in chosen.values()), chosen

    price, best = 0.0, chosen_at(0.0)
    losses = sum(max(x.loss for x in types) for types in choices.values()) or 1.0
    for power in range(_RAISES):
        if best[0] <= time:
            break
        price = _DEARER ** (power - 3) * losses / time
        best = chosen_at(price)
    low = price / _DEARER
    for _ in range(_HALVINGS if price else 0):
        middle = (low + price) / 2
        if (trial := chosen_at(middle))[0] <= time:
            price, best = middle, trial
        else:
            low = middle
    return best[1]


def _within(
    choices: Mapping[str, Sequence[Choice]], nbytes: int, price: float
) -> dict[str, Choice]:
    """The types of least loss whose bytes add up to at most `nbytes`, at a price of a nanosecond.

    For a sum of bytes the sum of the losses is least where one more byte would save as much loss in
    every weight (Lagrange). So all weights start with their smallest type. The step to another type
    that saves the most loss per byte is taken first, along the convex hull of each weight's types,
    as long as it fits.
    """

    def cost(choice: Choice) -> float:
        return choice.loss + price * choice.time

    chosen = {
        name: min(types, key=lambda x: (x.nbytes, cost(x))) for name, types in choices.items()
    }
    left = nbytes - sum(choice.nbytes for choice in chosen.values())
    while True:
        steps = [
            ((cost(now) - cost(better)) / more, name, better)
            for name, now in chosen.items()
            for better in choices[name]
            if cost(better) < cost(now) and 0 < (more := better.nbytes - now.nbytes) <= left
        ]
        if not steps:
            return chosen
        _, name, better = max(steps)
        left -= better.nbytes - chosen[name].nbytes
        chosen[name] = better
