"""What a target such as `parameters=0.75` asks for, and how far a smaller model is from it.

    parameters=0.75   at most this share of the parameters in blocks stays
    memory=3GB        all tensors of the checkpoint take at most this much
    speed=1.3x        each new token at batch 1 reads at least 1.3 times fewer bytes

The last one is a model of decoding: one token at a time, the weights of all blocks and of the head
are read once, of a mixture of experts only the experts that a token chooses, and memory sets the
pace. Caches, kernels and overhead are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prunus.hardware.sizes import parse_bytes

__all__ = ["Size", "Target", "parse_target", "total"]

Kind = Literal["parameters", "memory", "speed"]


@dataclass(frozen=True)
class Size:
    """What the three kinds of target count.

    Attributes:
        parameters: in blocks.
        memory: bytes of all tensors.
        read: bytes that a new token reads.
    """

    parameters: int
    memory: int
    read: int


@dataclass(frozen=True)
class Target:
    """A target as it was given.

    Attributes:
        kind: what it counts.
        value: a share of the parameters, bytes, or a ratio of bytes.
    """

    kind: Kind
    value: float

    def cost(self, size: Size) -> int:
        """What a search pays for each step: the parameters or bytes that the target counts."""
        counts = {"parameters": size.parameters, "memory": size.memory, "speed": size.read}
        return counts[self.kind]

    def reached(self, size: Size, whole: Size) -> float:
        """What a model comes to, in the unit of the target.

        Args:
            size: of the smaller model.
            whole: of the model that it is made from.

        >>> Target("speed", 1.3).reached(Size(3, 40, 20), Size(4, 50, 30))
        1.5
        """
        if self.kind == "memory":
            return size.memory
        if self.kind == "parameters":
            return size.parameters / whole.parameters
        return whole.read / size.read

    def is_met(self, size: Size, whole: Size) -> bool:
        """Whether a model meets the target.

        >>> Target("parameters", 0.75).is_met(Size(3, 40, 20), Size(4, 50, 30))
        True
        """
        reached = self.reached(size, whole)
        return reached >= self.value if self.kind == "speed" else reached <= self.value

    def shown(self, value: float) -> str:
        """A value in the unit of the target, as it is given.

        >>> Target("memory", 1).shown(3 * 1024**3), Target("speed", 1).shown(1.5)
        ('memory=3.000GB', 'speed=1.500x')
        """
        if self.kind == "memory":
            return f"memory={value / 1024**3:.3f}GB"
        return f"{self.kind}={value:.3f}{'x' if self.kind == 'speed' else ''}"

    def check(self, whole: Size, smallest: Size, name: str) -> None:
        """Check that the target can be met, and that something has to go for it.

        Args:
            whole: of the model.
            smallest: of the smallest model that a search could make of it.
            name: of the model, for the message.

        Raises:
            ValueError: it cannot, or nothing has to go; says what is possible.
        """
        if self.is_met(smallest, whole) and not self.is_met(whole, whole):
            return
        ends = [self.shown(self.reached(size, whole)) for size in (smallest, whole)]
        reason = "already meets it" if self.is_met(whole, whole) else "cannot become so small"
        raise ValueError(
            f"target {self.shown(self.value)}: {name} {reason}; possible is anything between "
            f"{ends[0]} and {ends[1]}, which is the model as it is"
        )


def parse_target(text: str) -> Target:
    """Read a target such as 'parameters=0.75', 'memory=3GB' or 'speed=1.3x'.

    >>> parse_target("speed=1.3x")
    Target(kind='speed', value=1.3)

    Raises:
        ValueError: it is none.
    """
    kind, _, value = (part.strip() for part in text.partition("="))
    if kind == "memory":
        return Target("memory", parse_bytes(value))
    number = re.fullmatch(r"(\d*\.?\d+)(x?)", value)
    if kind == "parameters" and number and not number[2] and 0 < float(number[1]) < 1:
        return Target("parameters", float(number[1]))
    if kind == "speed" and number and float(number[1]) > 1:
        return Target("speed", float(number[1]))
    raise ValueError(
        f"a target looks like parameters=0.75 (a share below 1 of the parameters in blocks), "
        f"memory=3GB or speed=1.3x (above 1); got {text[:80]!r}"
    )


def total(sizes: Sequence[Size], outside: Size) -> Size:
    """The size of a model of some blocks, with what lies outside of them."""
    return Size(
        *(
            sum(getattr(size, name) for size in [*sizes, outside])
            for name in ("parameters", "memory", "read")
        )
    )
