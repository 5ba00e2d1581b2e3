"""What a run will cost on machines that are not at hand: memory, disk, traffic and time from shapes and rates alone.

For decoders like Llama's: per block q, k, v, o and gate, up, down. Every term is work over a rate of `rates.py`. Knows no
checkpoint and no torch; what a checkpoint at hand costs on this machine is `costs.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from prunus.hardware.rates import Devices

__all__ = ["SHAPES", "Shape", "find_shape", "forecast"]

_STORED = 2  # bytes of a weight
_COLUMN_BLOCK = 128
# Tokens of one forward pass, as in `plan.py`.
_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder; `heads` of queries and `kv_heads` of keys and values, of `head` features each."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool = False

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of a block's linears: q, k, v, o, gate, up, down."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        attention = [(q, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, q)]
        gate = (self.intermediate, self.hidden)
        return [*attention, gate, gate, (self.hidden, self.intermediate)]

    @property
    def inputs(self) -> list[int]:
        """Widths of the distinct inputs: of q, k, v; of o; of gate, up; of down."""
        return [self.hidden, self.heads * self.head, self.hidden, self.intermediate]

    @property
    def block_weights(self) -> int:
        """Weights of a block's linears."""
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def outside_weights(self) -> int:
        """Weights of embedding and head."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden


#: Published widths.
SHAPES: dict[str, Shape] = {
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 64, 49152, tied=True),
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 128, 32000),
    "llama-13b": Shape(5120, 13824, 40, 40, 40, 128, 32000),
    "llama-30b": Shape(6656, 17920, 60, 52, 52, 128, 32000),
    "llama-65b": Shape(8192, 22016, 80, 64, 64, 128, 32000),
    "llama2-70b": Shape(8192, 28672, 80, 64, 8, 128, 32000),
    "llama3-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "llama3-70b": Shape(8192, 28672, 80, 64, 8, 128, 128256),
    "llama3-405b": Shape(16384, 53248, 126, 128, 8, 128, 128256),
}


def find_shape(name: str) -> Shape:
    """The shape called `name`.

    Raises:
        ValueError: there is none; lists those there are.
    """
    if name not in SHAPES:
        raise ValueError(f"the model shape {name!r} is unknown: choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def forecast(
    shape: Shape, devices: Devices, method: str, samples: int, seqlen: int, batch: int | None = None
) -> dict[str, Any]:
    """Memory, disk, traffic and time of a run.

    Args:
        shape: of the model.
        devices: what it is spread over.
        method: magnitude, wanda or sparsegpt.
        samples, seqlen: calibration windows and their tokens.
        batch: windows per forward pass; None for what `prune` takes.

    Returns:
        Bytes under `memory` (per rank; on a GPU, on it), `host_memory`, `disk`, `read`, `written`; `traffic`, bytes that
        each rank receives; `seconds` in all and `parts`: seconds by kind of work, in all blocks; `lockstep`: whether all
        windows of a rank fit in a device's memory at once (None for processors, whose memory is not known).

    Raises:
        ValueError: a method that is not forecast, numbers below 1.
    """
    if method not in ("magnitude", "wanda", "sparsegpt"):
        raise ValueError(f"{method} is not forecast: choose magnitude, wanda or sparsegpt")
    if samples < 1 or seqlen < 1:
        raise ValueError(f"{samples} windows of {seqlen} tokens are none: both must be at least 1")
    batch = batch or max(1, min(samples, _TOKENS_PER_BATCH // seqlen))
    batches = math.ceil(samples / batch) if method != "magnitude" else 0
    mine = min(samples, math.ceil(batches / devices.ranks) * batch)
    work = _Work(
        shape, devices, method, batches, mine * seqlen, min(batch, samples) * seqlen, seqlen
    )
    parts = {name: shape.blocks * seconds for name, seconds in work.seconds().items()}
    parts["embeddings"] = _STORED * 2 * shape.outside_weights / devices.rates.write
    parts["start"] = devices.rates.start
    memory = work.memory(lockstep=True)
    room = devices.rates.memory
    fits = None if room is None else memory <= room
    if fits is False:
        memory = work.memory(lockstep=False)
        parts["forward"] *= 5  # see `engine/lockstep.py`, replay
    checkpoint = _STORED * (shape.blocks * shape.block_weights + shape.outside_weights)
    return {
        "devices": devices.text,
        "rates": devices.rates.source,
        "ranks": devices.ranks,
        "weights": shape.blocks * shape.block_weights + shape.outside_weights,
        "windows_per_rank": mine,
        "memory": memory,
        "lockstep": fits,
        "disk": checkpoint,
        "read": checkpoint * devices.ranks,
        "written": checkpoint,
        "traffic": shape.blocks * work.traffic(),
        "seconds": sum(parts.values()),
        "parts": parts,
    }


@dataclass(frozen=True)
class _Work:
    """One block on one rank. `tokens` of its own windows, `at_once` in one forward pass, `batches` of all ranks."""

    shape: Shape
    devices: Devices
    method: str
    batches: int
    tokens: int
    at_once: int
    seqlen: int

    @property
    def gram(self) -> bool:
        return self.method == "sparsegpt"

    @property
    def size(self) -> int:
        """Bytes of a number in the forward pass: a Gram that is inverted asks a processor for float32."""
        return 4 if self.gram and self.devices.rates.memory is None else 2

    def seconds(self) -> dict[str, float]:
        """By kind of work."""
        shape, rates, ranks = self.shape, self.devices.rates, self.devices.ranks
        weights, inputs = shape.block_weights, shape.inputs
        products = rates.products if self.size == 2 else rates.products32
        activations = 8 * shape.hidden + 4 * shape.intermediate
        attention = 4.0 * self.seqlen * shape.heads * shape.head
        forward = self.tokens * (2 * weights / products + attention / rates.attention)
        forward += self.tokens * activations / rates.elements * self.size / 2
        statistics = 0.0
        if self.batches:
            statistics = self.tokens * sum(inputs) / rates.elements
        solve = 0.0 if self.gram else weights / rates.weights
        if self.gram:
            # On a processor the blocks on and above a Gram's diagonal only: 10 of 16.
            half = 0.625 if rates.memory is None else 1.0
            statistics += half * 2 * self.tokens * sum(c * c for c in inputs) / rates.products32
            factors = sum(c**3 for c in inputs) / rates.factor32
            by_rows = (
                sum(5.0 * r * c * c for r, c in shape.linears) / rates.products32
                + weights / rates.swept
            )
            # Every rank goes through all columns of its rows, and stores all rows.
            columns = sum(c for _, c in shape.linears) / rates.columns
            solve = factors + columns + by_rows / ranks + weights / rates.finished
        stored = _STORED * weights
        files = (
            stored / rates.read + (1 + (ranks > 1)) * stored / rates.hashed + stored / rates.write
        )
        return {
            "forward": forward,
            "statistics": statistics,
            "solve": solve,
            "files": files,
            "communication": self.traffic() / rates.link + self.meetings() * rates.latency,
        }

    def traffic(self) -> float:
        """Bytes that a rank receives."""
        ranks, share = self.devices.ranks, 1 - 1 / self.devices.ranks
        if ranks == 1:
            return 0.0
        received = 8.0 * share * self.batches * sum(self.shape.inputs)
        if self.gram:
            # A ring sums a matrix in two rounds; scores go out as float32, results as float32 and a byte of mask.
            received += 2 * share * 4 * sum(c * c for c in self.shape.inputs)
            received += share * (4 + 5) * self.shape.block_weights
        return received

    def meetings(self) -> int:
        """How often all ranks wait for each other."""
        if self.devices.ranks == 1:
            return 0
        count = 4 + len(self.shape.linears) + 3 * len(self.shape.inputs)
        if self.gram:
            count += len(self.shape.inputs)
            count += sum(
                3 + math.ceil(columns / _COLUMN_BLOCK) for _, columns in self.shape.linears
            )
        return count

    def memory(self, lockstep: bool) -> float:
        """Bytes at the highest point."""
        shape, size, rates = self.shape, self.size, self.devices.rates
        largest = max(rows * columns for rows, columns in shape.linears)
        widest = max(max(pair) for pair in shape.linears)
        block = (2 * _STORED + size) * shape.block_weights
        working = _WORKING * largest
        if self.gram:
            # The Gram, a copy, and what is factored; or the factor, and the weights being swept.
            working = 16 * max(shape.inputs) ** 2 + 4 * largest
        hidden = self.tokens * shape.hidden * size
        paused = self.tokens * (4 * shape.hidden + widest) * size if lockstep else 0
        transient = self.at_once * (6 * shape.hidden + 3 * widest) * size if self.batches else 0
        outer = shape.vocabulary * shape.hidden * (_STORED + size) + hidden
        # While a linear is pruned no forward pass is under way.
        return rates.process + max(outer, block + hidden + paused + max(working, transient))


# Bytes per weight of the largest linear while it is pruned: float32 weight, score, sorted copy, and the result.
_WORKING = 14
