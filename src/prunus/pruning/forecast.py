"""What a run will cost on machines that are not present: memory, disk, traffic and time.

The model is a decoder like Llama, known by its widths only: q, k, v, o and gate, up, down in every
block. Every term is an amount of work over a rate of `prunus.hardware.rates`. `cost.py` does the
same for a checkpoint that is present, on this machine. This file imports no torch.

The rates of processor cores are measured. Those of GPUs are vendors' peak figures times an assumed
share, and every result says so in its field `basis`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from prunus.hardware.rates import ASSUMED_SHARE, Devices, Rates
from prunus.runs.batch_size import windows_per_batch
from prunus.runs.block_memory import (
    BYTES_PER_PRUNED_WEIGHT,
    REPLAY_PASSES,
    paused_bytes,
    transient_bytes,
)

__all__ = ["SHAPES", "Shape", "find_shape", "forecast"]

_METHODS = ("magnitude", "wanda", "sparsegpt")
_STORED = 2  # Bytes of a stored weight.
_COLUMN_BLOCK = 128  # Columns that SparseGPT solves at once.


@dataclass(frozen=True)
class Shape:
    """The widths of a decoder.

    >>> find_shape("llama-7b").linears[0]
    (4096, 4096)

    Attributes:
        hidden: Width of the hidden states.
        intermediate: Width of the feed-forward network.
        blocks: Number of blocks.
        heads, kv_heads: Attention heads of the queries, and of the keys and values.
        head: Features of a head.
        vocabulary: Number of token ids.
        tied: Whether head and embedding share their weights.
    """

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

    @property
    def weights(self) -> int:
        """All weights but the norms' and biases."""
        return self.blocks * self.block_weights + self.outside_weights


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
    """The published widths of a model.

    >>> find_shape("llama-7b").blocks
    32

    Raises:
        ValueError: The name is unknown; lists the known ones.
    """
    if name not in SHAPES:
        raise ValueError(f"the model shape {name!r} is unknown: choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def forecast(
    shape: Shape, devices: Devices, method: str, samples: int, seqlen: int, batch: int | None = None
) -> dict[str, Any]:
    """Memory, disk, traffic and time of a run.

    >>> from prunus.hardware.rates import parse_devices
    >>> found = forecast(find_shape("llama-7b"), parse_devices("8xh100"), "wanda", 128, 2048)
    >>> found["ranks"], found["windows_per_rank"], found["basis"]
    (8, 16, "vendors' peak figures times an assumed share of 0.5, not measured")

    Args:
        shape: The widths of the model.
        devices: The processors or GPUs that share the run.
        method: magnitude, wanda or sparsegpt.
        samples: Calibration windows.
        seqlen: Tokens of a window.
        batch: Windows per forward pass; None for the default of `prune`.

    Returns:
        Bytes: `memory` (of each rank, on the GPU if it has one), `disk`, `read`, `written`, and
        `traffic` (what each rank receives). Seconds: `seconds` in all, and `parts` by kind of work.
        The sum of the parts is larger than `seconds`, because the next block is read and the last
        one written while one is pruned.
        Counts: `ranks`, `weights`, `windows_per_rank`. `lockstep`: whether all windows of a rank
        fit in its GPU's memory at once, or None for processors, whose memory is unknown. `devices`,
        `rates` and `basis`: the machine, the source of its rates, and whether they are measured.

    Raises:
        ValueError: The method cannot be forecast, or a number is below 1.
    """
    if method not in _METHODS:
        raise ValueError(
            f"{method} is not forecast: choose --method magnitude, wanda or sparsegpt (sparsegpt "
            "is a lower bound for alps, which the presets balanced and best use), or give MODEL, a "
            "checkpoint, to plan the whole recipe"
        )
    if samples < 1 or seqlen < 1:
        raise ValueError(f"{samples} windows of {seqlen} tokens are none: both must be at least 1")
    rates = devices.rates
    batch = batch or windows_per_batch(samples, seqlen)
    batches = math.ceil(samples / batch) if method != "magnitude" else 0
    # Ranks split the windows by whole batches.
    own = min(samples, math.ceil(batches / devices.ranks) * batch)
    work = _BlockWork(
        shape, devices, method, batches, own * seqlen, min(batch, samples) * seqlen, seqlen
    )
    parts = work.seconds()
    memory = work.memory(lockstep=True)
    fits = None if rates.memory is None else memory <= rates.memory
    if fits is False:
        memory = work.memory(lockstep=False)
        parts["forward"] *= REPLAY_PASSES
    # Files are read and written beside the work on a block, except the first and the last one.
    files = {name: parts[name] for name in ("reading", "writing")}
    working = sum(parts.values()) - sum(files.values())
    seconds = shape.blocks * max(working, *files.values()) + sum(files.values())
    parts = {name: shape.blocks * part for name, part in parts.items()}
    parts["embeddings"] = _STORED * 2 * shape.outside_weights / rates.write
    parts["start"] = rates.start
    checkpoint = _STORED * shape.weights
    return {
        "devices": devices.text,
        "rates": rates.source,
        "basis": _basis(rates),
        "ranks": devices.ranks,
        "weights": shape.weights,
        "windows_per_rank": own,
        "memory": memory,
        "lockstep": fits,
        "disk": checkpoint,
        "read": checkpoint * devices.ranks,
        "written": checkpoint,
        "traffic": shape.blocks * work.traffic(),
        "seconds": seconds + parts["embeddings"] + parts["start"],
        "parts": parts,
    }


def _basis(rates: Rates) -> str:
    """What the seconds of a forecast rest on, in words."""
    if _is_processor(rates):
        return "rates measured on one processor core, times the number of cores"
    return f"vendors' peak figures times an assumed share of {ASSUMED_SHARE:g}, not measured"


def _is_processor(rates: Rates) -> bool:
    """Whether the rates are those of processor cores; these share the host's memory."""
    return rates.memory is None


@dataclass(frozen=True)
class _BlockWork:
    """The work on one block on one rank.

    Attributes:
        shape: The widths of the model.
        devices: The processors or GPUs that share the run.
        method: magnitude, wanda or sparsegpt.
        batches: Batches of windows, over all ranks.
        tokens: Tokens of this rank's windows.
        batch_tokens: Tokens of one forward pass.
        seqlen: Tokens of a window.
    """

    shape: Shape
    devices: Devices
    method: str
    batches: int
    tokens: int
    batch_tokens: int
    seqlen: int

    @property
    def gram(self) -> bool:
        """Whether the method sums Gram matrices."""
        return self.method == "sparsegpt"

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the forward pass; see `compute_dtype.py` for why 4."""
        return 4 if self.gram and _is_processor(self.devices.rates) else 2

    def seconds(self) -> dict[str, float]:
        """Seconds by kind of work."""
        return {
            "forward": self._forward_seconds(),
            "statistics": self._statistics_seconds(),
            "solve": self._solve_seconds(),
            **self._file_seconds(),
            "communication": self.traffic() / self.devices.rates.link
            + self.synchronizations() * self.devices.rates.latency,
        }

    def _forward_seconds(self) -> float:
        shape, rates = self.shape, self.devices.rates
        products = rates.products if self.itemsize == 2 else rates.products32
        # Norms, residuals and activation functions touch about this many numbers per token.
        activations = 8 * shape.hidden + 4 * shape.intermediate
        # Scores and values: two products per head, at 2 operations each.
        attention = 4.0 * self.seqlen * shape.heads * shape.head
        seconds = self.tokens * (2 * shape.block_weights / products + attention / rates.attention)
        # The rate of elements holds for 2-byte numbers.
        return seconds + self.tokens * activations / rates.elements * self.itemsize / 2

    def _statistics_seconds(self) -> float:
        rates, inputs = self.devices.rates, self.shape.inputs
        seconds = self.tokens * sum(inputs) / rates.elements if self.batches else 0.0
        if self.gram:
            # A processor computes only the tiles on and above a Gram's diagonal: 10 of 16.
            share = 0.625 if _is_processor(rates) else 1.0
            seconds += share * 2 * self.tokens * sum(c * c for c in inputs) / rates.grams
        return seconds

    def _solve_seconds(self) -> float:
        shape, rates = self.shape, self.devices.rates
        if not self.gram:
            return shape.block_weights / rates.weights
        factors = sum(c**3 for c in shape.inputs) / rates.factor32
        # Every rank goes through all columns, but only of its own rows. It stores all rows.
        columns = sum(c for _, c in shape.linears) / rates.columns
        by_rows = (
            sum(5.0 * r * c * c for r, c in shape.linears) / rates.products32
            + shape.block_weights / rates.swept
        )
        finished = shape.block_weights / rates.finished
        return factors + columns + by_rows / self.devices.ranks + finished

    def _file_seconds(self) -> dict[str, float]:
        rates, stored = self.devices.rates, _STORED * self.shape.block_weights
        # The source is hashed and so is the result. Several ranks also hash their results on the
        # way, to see that all are the same.
        hashing, compared = stored / rates.hashed, self.devices.ranks > 1
        reading, writing = stored / rates.read, stored / rates.write
        if rates.bus is None:
            # Hashes take turns with everything else on the same cores.
            return {"reading": reading, "writing": writing, "hashing": (2 + compared) * hashing}
        return {
            "reading": reading + hashing,
            # A file is hashed on another thread than it is written on.
            "writing": max(writing, hashing),
            "hashing": compared * hashing,
            "transfers": 2 * stored / rates.bus,
        }

    def traffic(self) -> float:
        """Bytes that a rank receives."""
        ranks, share = self.devices.ranks, 1 - 1 / self.devices.ranks
        if ranks == 1:
            return 0.0
        # Sums of squares go out batch by batch, in float64.
        received = 8.0 * share * self.batches * sum(self.shape.inputs)
        if self.gram:
            # A ring sums a float32 matrix in two rounds.
            received += 2 * share * 4 * sum(c * c for c in self.shape.inputs)
            # Scores go out as float32, results as float32 with one byte of mask.
            received += share * (4 + 5) * self.shape.block_weights
        return received

    def synchronizations(self) -> int:
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
        """Bytes at the peak, with all windows paused at once or one batch in flight."""
        shape, itemsize, rates = self.shape, self.itemsize, self.devices.rates
        largest = max(rows * columns for rows, columns in shape.linears)
        widest = max(max(pair) for pair in shape.linears)
        block = (2 * _STORED + itemsize) * shape.block_weights
        working = BYTES_PER_PRUNED_WEIGHT * largest
        if self.gram:
            # Four float32 matrices like the Gram: itself, a copy, its factor and temporaries; and
            # the weights that are solved.
            working = 16 * max(shape.inputs) ** 2 + 4 * largest
        hidden = self.tokens * shape.hidden * itemsize
        paused = paused_bytes(self.tokens, shape.hidden, widest, itemsize) if lockstep else 0
        transient = 0
        if self.batches:
            transient = transient_bytes(self.batch_tokens, shape.hidden, widest, itemsize)
        embedding = shape.vocabulary * shape.hidden * (_STORED + itemsize) + hidden
        # No forward pass runs while a linear is pruned, so the larger of the two counts.
        in_block = block + hidden + paused + max(working, transient)
        return rates.process + max(embedding, in_block)
