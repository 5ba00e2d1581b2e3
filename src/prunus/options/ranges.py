"""Which values an option takes. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Range:
    """Which values an option takes.

    Attributes:
        allows: Whether a value is in range.
        must: The range in words, after "must": "lie in (0, 1)".
    """

    allows: Callable[[Any], bool]
    must: str

    def check(self, name: str, value: Any) -> None:
        """Check the value of the option `name`. None stands for the default and passes.

        >>> at_least(1).check("samples", 0)
        Traceback (most recent call last):
        ValueError: samples must be at least 1; got 0
        """
        if value is not None and not self.allows(value):
            raise ValueError(f"{name} must {self.must}; got {value!r}")


def at_least(minimum: int, what: str = "") -> Range:
    """The range of a count: `minimum` or more. `what` continues the sentence."""
    return Range(lambda value: value >= minimum, f"be at least {minimum}{what}")


def between(text: str, what: str = "") -> Range:
    """The range of a number in an interval such as "(0, 1)" or "[0, 1)".

    A bracket includes its end, a parenthesis excludes it. No interval includes NaN.

    >>> between("[0, 1)").allows(0), between("[0, 1)").allows(1)
    (True, False)
    """
    low, high = (float(end) for end in text[1:-1].split(","))

    def allows(value: float) -> bool:
        above = value >= low if text[0] == "[" else value > low
        below = value <= high if text[-1] == "]" else value < high
        return above and below

    return Range(allows, f"lie in {text}{what}")


def one_of(choices: Sequence[Any]) -> Range:
    """The range of a name or a number in a list.

    >>> one_of((4, 6, 8)).must
    'be 4, 6 or 8'
    """
    listed = f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}"
    return Range(lambda value: value in choices, f"be {listed}")
