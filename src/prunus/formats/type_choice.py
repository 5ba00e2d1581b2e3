"""The type of each weight: the least loss within a sum of bytes, and within a sum of times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

# The search for the price of time: the factor by which it is raised, the most times it is raised,
# and how many times the interval that has the price is halved then.
_DEARER, _RAISES, _HALVINGS = 8.0, 10, 6


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


def choose_types(choices: Mapping[str, Sequence[Choice]], nbytes: int) -> dict[str, str]:
    """The types of least loss whose bytes add up to at most `nbytes`.

    For a sum of bytes the sum of the losses is least where one more byte would save as much loss in
    every weight (Lagrange). So all weights start with their smallest type. The step to another type
    that saves the most loss per byte is taken first, along the convex hull of each weight's types,
    as long as it fits.

    Args:
        choices: Name of a weight -> the types that it can have.
        nbytes: The bytes of all weights together. Where even the smallest types take more, these
            are chosen.

    Returns:
        Name of a weight -> name of its type.

    >>> narrow, wide = Choice("Q3_K", 3, 9.0), Choice("Q6_K", 6, 1.0)
    >>> choose_types({"a": [narrow, wide], "b": [narrow, wide._replace(loss=5.0)]}, 9)
    {'a': 'Q6_K', 'b': 'Q3_K'}
    """
    chosen = {name: min(types, key=lambda x: (x.nbytes, x.loss)) for name, types in choices.items()}
    left = nbytes - sum(choice.nbytes for choice in chosen.values())
    while True:
        steps = [
            ((now.loss - better.loss) / more, name, better)
            for name, now in chosen.items()
            for better in choices[name]
            if better.loss < now.loss and 0 < (more := better.nbytes - now.nbytes) <= left
        ]
        if not steps:
            return {name: choice.kind for name, choice in chosen.items()}
        _, name, better = max(steps)
        left -= better.nbytes - chosen[name].nbytes
        chosen[name] = better


def choose_fast_types(
    choices: Mapping[str, Sequence[Choice]], nbytes: int, time: float
) -> dict[str, str]:
    """The types of least loss within `nbytes` that together take at most `time` for a token.

    For two sums to bound, each has its price (Lagrange). So the loss of a type gets what its time
    costs, and the smallest price for which the time is kept is searched for.

    Args:
        choices: Name of a weight -> the types that it can have.
        nbytes: The bytes of all weights together.
        time: Nanoseconds of all weights together. Where no choice is as fast, the fastest one that
            was seen is taken.

    Returns:
        Name of a weight -> name of its type.

    >>> slow, fast = Choice("IQ4_XS", 4, 1.0, time=9.0), Choice("Q4_K", 4, 2.0, time=5.0)
    >>> choose_fast_types({"a": [slow, fast], "b": [slow, fast._replace(loss=9.0)]}, 8, 14.0)
    {'a': 'Q4_K', 'b': 'IQ4_XS'}
    """

    def chosen_at(price: float) -> tuple[float, dict[str, str]]:
        """The time of the types that are best at this price of a nanosecond, and the types."""
        priced = {
            name: [x._replace(loss=x.loss + price * x.time) for x in types]
            for name, types in choices.items()
        }
        kinds = choose_types(priced, nbytes)
        times = [x.time for name, types in choices.items() for x in types if x.kind == kinds[name]]
        return sum(times), kinds

    price, chosen = 0.0, chosen_at(0.0)
    losses = sum(max(x.loss for x in types) for types in choices.values()) or 1.0
    for power in range(_RAISES):
        if chosen[0] <= time:
            break
        price = _DEARER ** (power - 3) * losses / time
        chosen = chosen_at(price)
    low = price / _DEARER
    for _ in range(_HALVINGS if price else 0):
        middle = (low + price) / 2
        if (trial := chosen_at(middle))[0] <= time:
            price, chosen = middle, trial
        else:
            low = middle
    return chosen[1]
