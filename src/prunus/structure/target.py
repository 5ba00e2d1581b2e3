"""What a target such as `parameters=0.75` asks for, and how close a smaller model is to it.

    parameters=0.75   keep at most this share of the parameters in blocks
    memory=3GB        let all tensors of the checkpoint take at most this much
    speed=1.3x        read at least 1.3 times fewer bytes for each new token at batch 1

The last one is a model of decoding: one token at a time, the weights of all blocks and of the head
are read once, of a mixture of experts only those that a token chooses, and memory limits the speed.
Caches, kernels and overhead are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from prunus.hardware.sizes import parse_bytes


@dataclass(frozen=True)
class Target:
    """A target as it was given.

    Attributes:
        kind: what it counts, the size of a model: its parameters in blocks, the bytes of all
            tensors, or the bytes that are read for a token.
        value: a share of the parameters, bytes, or a ratio of bytes.
    """

    kind: Literal["parameters", "memory", "speed"]
    value: float

    def reached(self, size: int, whole: int) -> float:
        """What a model of some size reaches, in the unit of the target.

        >>> Target("speed", 1.3).reached(20, 30)
        1.5
        """
        if self.kind == "memory":
            return size
        return size / whole if self.kind == "parameters" else whole / size

    def is_met(self, size: int, whole: int) -> bool:
        """Whether a model of some size meets the target.

        >>> Target("parameters", 0.75).is_met(3, 4)
        True
        """
        reached = self.reached(size, whole)
        return reached >= self.value if self.kind == "speed" else reached <= self.value

    def shown(self, value: float) -> str:
        """A value in the unit of the target, as a user gives it.

        >>> Target("memory", 1).shown(3 * 1024**3), Target("speed", 1).shown(1.5)
        ('memory=3.000GB', 'speed=1.500x')
        """
        if self.kind == "memory":
            return f"memory={value / 1024**3:.3f}GB"
        return f"{self.kind}={value:.3f}{'x' if self.kind == 'speed' else ''}"


def parse_target(text: str) -> Target:
    """Read a target such as 'parameters=0.75', 'memory=3GB' or 'speed=1.3x'.

    >>> parse_target("speed=1.3x")
    Target(kind='speed', value=1.3)
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
