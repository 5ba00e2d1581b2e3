"""A checked run of blocks: its model, its windows, where the data live, and what fits in memory.

Every verb that takes calibration windows through a model block by block has such a job. It adds
what it does to a block. `prunus.engine.plan` makes the part that is the same for all.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from prunus.distributed import Ranks
from prunus.engine.options import RunOptions, WindowOptions
from prunus.engine.progress import PREPARATION, Progress
from prunus.engine.record import Walk
from prunus.hardware.memory import peak_memory
from prunus.hardware.numerics import check_finite
from prunus.methods.statistics import Needs, statistics_bytes
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource, Source, tensors_digest


@dataclass(kw_only=True)
class RunJob:
    """The decisions of one run, as far as they concern its model and its windows.

    Attributes:
        recipe: The options that decide the bytes of the result.
        options: The options that only decide how the work is done.
        model_name: The model as the user named it; the class name of a loaded model.
        source: The dense weights.
        skeleton: The model without weights, in the dtype of the computation.
        device: Where blocks run.
        dtype: The dtype of the forward passes.
        dtype_reason: Why it is that dtype, in words.
        batch: Calibration windows per forward pass.
        budget: Memory for the run on `device`, in bytes.
        host_budget: Memory for the run on the host, in bytes. On a CPU both budgets are the same.
        needs: The statistics of each linear's inputs that the run collects.
        needs_inputs: Whether calibration windows run through the model at all.
        block_memory: The memory that each block needs; empty before `measure_memory`.
        measured: Name of a block -> SHA-256 of the weights that a measurement before the first
            block read. The record of the run holds the same.
    """

    recipe: WindowOptions
    options: RunOptions
    model_name: str
    source: CheckpointSource | ModuleSource
    skeleton: Skeleton
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    batch: int
    budget: int
    host_budget: int
    needs: Needs
    needs_inputs: bool
    block_memory: list[BlockMemory] = field(default_factory=list)
    measured: dict[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> Ranks:
        """The processes that work on the run."""
        return self.options.processes

    @functools.cached_property
    def checkpoint(self) -> CheckpointSource:
        """The source of a run that reads a checkpoint."""
        assert isinstance(self.source, CheckpointSource)
        return self.source

    @property
    def hashed_source(self) -> HashedSource:
        """The source for a measurement, which notes or compares the hashes of what it reads."""
        return HashedSource(self.source, self.skeleton, self.measured)

    @property
    def batches(self) -> int:
        """Batches of calibration windows, over all ranks."""
        return -(-self.recipe.samples // self.batch)

    @property
    def windows(self) -> int:
        """The largest number of windows that any rank holds. Ranks split the windows by batches."""
        return min(self.recipe.samples, -(-self.batches // self.ranks.size) * self.batch)

    @property
    def tokens(self) -> int:
        """Tokens of all calibration windows, as the first block sees them."""
        return self.recipe.samples * self.skeleton.window_shape(0, self.recipe.seqlen)[0]

    def preparing(self, what: str, total: int) -> Callable[[int], None]:
        """Announce work before the first block, and return a function that counts its steps.

        Args:
            what: The work in words, such as "measuring …".
            total: The steps of the work, each of about the same time.

        Returns:
            A function to call with the number of steps that were done since its last call.
        """
        started, done = time.perf_counter(), 0
        self.options.tell(what)

        def count(steps: int) -> None:
            nonlocal done
            done += steps
            seconds, peak = time.perf_counter() - started, peak_memory(self.device)
            self.options.tell(Progress(done, total, what, seconds, peak, PREPARATION + what))

        return count

    # What a verb says.

    @property
    def runs_dense_stream(self) -> bool:
        """Whether batches also run through the dense model."""
        return False

    def walk(self, index: int) -> Walk:
        """How the windows run through block `index`; lockstep and replay give the same bits."""
        return "lockstep" if self.fits_lockstep(index) else "replay"

    def check_ranks(self) -> None:
        """Check that the ranks can carry out the recipe together."""

    def working_bytes(self, index: int) -> int:
        """Bytes of temporaries while a linear of block `index` changes, and of its statistics."""
        linears = self.skeleton.linears(index)
        largest = max(linear.shape[0] * linear.shape[1] for linear in linears)
        inputs = max(linear.shape[1] for linear in linears)
        working = BYTES_PER_PRUNED_WEIGHT * largest + statistics_bytes(inputs, self.needs)
        if self.needs == "gram":
            # Solvers hold six float32 matrices like the weight, and six like the Gram matrix, or
            # three of the latter in float64.
            working += 6 * 4 * largest + 6 * 4 * inputs**2
        return working

    def training_bytes(self, index: int) -> tuple[int, int]:
        """Bytes of the training of block `index`: those that stay, and those of one batch."""
        return 0, 0

    # Where the data live and how they move.

    def measure_memory(self) -> None:
        """Fill in `block_memory`, from shapes alone."""
        self.block_memory = [self._block_memory(index) for index in range(len(self.skeleton))]

    def _block_memory(self, index: int) -> BlockMemory:
        linears, itemsize = self.skeleton.linears(index), self.dtype.itemsize
        window_tokens, hidden = self.skeleton.window_shape(index, self.recipe.seqlen)
        tokens = self.windows * window_tokens
        batch_tokens = min(self.batch * window_tokens, tokens)
        widest = max(max(linear.shape) for linear in linears)
        parameters = sum(p.numel() for p in self.skeleton.blocks[index].parameters())
        # The hidden states of the dense model are kept next to those of the changed one.
        models = 2 if self.runs_dense_stream else 1
        streams = self.needs_inputs * models
        stays, moves = self.training_bytes(index)
        batch = self.needs_inputs * transient_bytes(batch_tokens, hidden, widest, itemsize)
        return BlockMemory(
            weights=2 * self.source.block_nbytes(index) + models * parameters * itemsize,
            working=self.working_bytes(index) + stays,
            hidden=streams * tokens * hidden * itemsize,
            paused=streams * paused_bytes(tokens, hidden, widest, itemsize),
            transient=batch + moves,
        )

    @property
    def hidden_states_stay(self) -> bool:
        """Whether hidden states stay on the device between blocks.

        They do if they fit there next to one batch in flight, and if keeping them elsewhere would
        not let more blocks run in lockstep. Reading them back costs less than a second pass.
        """
        fits = all(
            memory.total(hidden=True, paused=False) <= self.budget for memory in self.block_memory
        )
        return fits and self._in_lockstep(hidden=True) >= self._in_lockstep(hidden=False)

    def _in_lockstep(self, *, hidden: bool) -> int:
        """How many blocks can run in lockstep, with the hidden states here or elsewhere."""
        needed = (memory.total(hidden=hidden, paused=True) for memory in self.block_memory)
        return sum(nbytes <= self.budget for nbytes in needed)

    @property
    def spills(self) -> bool:
        """Whether a file holds the hidden states: neither the device nor the host has room."""
        if self.hidden_states_stay:
            return False
        largest = max(memory.hidden for memory in self.block_memory)
        return self.device.type == "cpu" or largest > self.host_budget

    def fits_lockstep(self, index: int) -> bool:
        """Whether all batches can pause in block `index` at once."""
        needed = self.block_memory[index].total(hidden=self.hidden_states_stay, paused=True)
        return needed <= self.budget

    @property
    def overlaps(self) -> bool:
        """Whether the next block is read and the last one written while one is changed.

        This takes memory for two blocks more, and changes nothing but the time.
        """
        return not isinstance(self.source, ModuleSource) and all(
            self.host_bytes(index) + self.overlap_bytes(index) <= self.host_budget
            for index in range(len(self.block_memory))
        )

    def overlap_bytes(self, index: int) -> int:
        """Bytes of the block that is read and of the one that is written next to block `index`."""
        near = [i for i in (index - 1, index + 1) if 0 <= i < len(self.block_memory)]
        return sum(self.source.block_nbytes(i) for i in near)

    def host_bytes(self, index: int) -> int:
        """Bytes that block `index` needs on the host, with nothing read or written meanwhile."""
        memory = self.block_memory[index]
        if self.device.type != "cpu":
            return 0 if self.hidden_states_stay or self.spills else memory.hidden
        return memory.total(hidden=self.hidden_states_stay, paused=self.fits_lockstep(index))

    def peak_bytes(self) -> int:
        """The largest need of any block on the device, or of what is before them, in bytes."""
        stay, overlaps = self.hidden_states_stay, self.overlaps and self.device.type == "cpu"
        needed = [
            memory.total(hidden=stay, paused=self.fits_lockstep(index))
            + overlaps * self.overlap_bytes(index)
            for index, memory in enumerate(self.block_memory)
        ]
        if not isinstance(self.source, ModuleSource):
            # The embedding is in memory while it is applied to the windows and block 0 is read.
            embedding = self.source.checkpoint.nbytes(self.source.outside_keys())
            first = stay * self.block_memory[0].hidden + overlaps * self.source.block_nbytes(0)
            needed.append(embedding + first)
        return max(needed)

    def file_bytes(self) -> int:
        """Bytes of the weights of the result; 0 for a loaded model, which has no file."""
        if isinstance(self.source, ModuleSource):
            return 0
        return self.source.checkpoint.nbytes(self.source.checkpoint.tensors)

    def disk_bytes(self) -> int:
        """Bytes of the result, with the file of spilled hidden states next to it."""
        if isinstance(self.source, ModuleSource):
            return 0
        spilled = max(memory.hidden for memory in self.block_memory) if self.spills else 0
        return self.file_bytes() + spilled


#: Temporaries per weight of a linear while it is pruned: the float32 weight and score, the sorted
#: copy of the score, and the result in the checkpoint's 2-byte dtype.
BYTES_PER_PRUNED_WEIGHT = 14


@dataclass(frozen=True)
class BlockMemory:
    """The memory of one block by purpose, in bytes.

    >>> memory = BlockMemory(weights=40, working=20, hidden=8, paused=16, transient=4)
    >>> memory.total(hidden=True, paused=True), memory.minimum
    (88, 64)

    Attributes:
        weights: The block in the dtype of the computation, the block as stored, and the pruned
            tensors that wait to be written.
        working: The temporaries of the largest linear while it is pruned, and its input statistics.
        hidden: The hidden states of all windows between two blocks.
        paused: What windows that pause at a linear hold next to their hidden states; see
            `paused_bytes`.
        transient: The activations of one batch's forward pass; see `transient_bytes`.
    """

    weights: int
    working: int
    hidden: int
    paused: int
    transient: int

    def total(self, *, hidden: bool, paused: bool) -> int:
        """Bytes in all.

        Args:
            hidden: Whether hidden states stay in this memory; otherwise a file or the host has
                them.
            paused: Whether all windows pause at once, as in lockstep; otherwise one batch does.
        """
        always = self.weights + self.working + self.transient
        return always + hidden * self.hidden + paused * self.paused

    @property
    def minimum(self) -> int:
        """Bytes with the hidden states elsewhere and one batch in flight."""
        return self.total(hidden=False, paused=False)


def paused_bytes(tokens: int, hidden: int, widest: int, itemsize: int) -> int:
    """Bytes that paused windows hold next to their hidden states.

    Per token these are four hidden states (residual, normed input, and queries with keys and
    values), and one activation as wide as the widest linear.

    Args:
        tokens: Tokens of all windows that pause.
        hidden: Width of a hidden state.
        widest: The largest width, of inputs or outputs, of any linear of the block.
        itemsize: Bytes of a number.

    >>> paused_bytes(tokens=10, hidden=4, widest=16, itemsize=2)
    640
    """
    return tokens * (4 * hidden + widest) * itemsize


def transient_bytes(tokens: int, hidden: int, widest: int, itemsize: int) -> int:
    """Bytes of the activations of one forward pass over `tokens` tokens.

    The peak lies in the feed-forward network. Six hidden states and three activations of the widest
    linear are in memory there. The other arguments are those of `paused_bytes`.

    >>> transient_bytes(tokens=10, hidden=4, widest=16, itemsize=2)
    1440
    """
    return tokens * (6 * hidden + 3 * widest) * itemsize


# Tokens of one forward pass: enough for large matrix products, few enough to stay in the cache.
_TOKENS_PER_BATCH = 4096


def windows_per_batch(
    samples: int, window_tokens: int, batch: int | None = None, trains: str = ""
) -> int:
    """Windows per forward pass: `batch`, or the default, which is at least 1.

    In training a batch is one step, which updates all weights of a block however few tokens it has.
    By default a step has about 1024 tokens. It has more where there would be more than 128 steps,
    and fewer where there would be fewer than eight steps.

    Args:
        samples: Calibration windows of the run.
        window_tokens: Tokens of a window.
        batch: What the user asks for; None for the default.
        trains: What trains on the batches, in one word for errors; "" where nothing does.

    Raises:
        ValueError: Something trains and there is only one batch, while training needs one more for
            validation.

    >>> [windows_per_batch(samples, 256) for samples in (8, 64, 1024)]
    [8, 16, 16]
    >>> [windows_per_batch(samples, 256, trains="repair") for samples in (8, 64, 1024)]
    [1, 4, 8]
    """
    if batch is None:
        most = _TOKENS_PER_BATCH // window_tokens
        if trains:
            most = min(max(1024 // window_tokens, -(-samples // 128)), samples // 8)
        batch = max(1, min(samples, most))
    if trains and samples <= batch:
        raise ValueError(
            f"{trains} trains on some batches and validates on others: "
            f"`samples` {samples} make one batch of {batch}; give more, or a smaller `batch`"
        )
    return batch


def check_known(digests: dict[str, str], block: str, digest: str) -> None:
    """Check that a block still has the weights that the run read before, if it did.

    Args:
        digests: Name of a block -> SHA-256 of the weights that were read before.
        block: Name of the block.
        digest: SHA-256 of the weights that were read now.

    Raises:
        FileExistsError: The hashes differ, so that the source was changed during the run.
    """
    if digests.get(block, digest) != digest:
        raise FileExistsError(
            f"{block} of the source is not what it was when the run read it first: the checkpoint "
            "was changed since. Put it back as it was, or choose `overwrite` to start again"
        )


class HashedSource:
    """Reads blocks of another source, and notes or compares their hashes the first time.

    All other attributes are those of the other source.

    Args:
        source: The source to read from.
        skeleton: The model, for the names of blocks.
        digests: Name of a block -> SHA-256. Missing hashes are added.
    """

    def __init__(self, source: Source, skeleton: Skeleton, digests: dict[str, str]) -> None:
        self._source, self._skeleton, self._digests = source, skeleton, digests
        self._seen: set[int] = set()

    def block(self, index: int, pinned: bool = False) -> dict[str, torch.Tensor]:
        """The tensors of a block by relative name.

        Raises:
            ValueError: A weight is not finite.
            FileExistsError: The block is not what it was when the run read it first.
        """
        tensors = self._source.block(index, pinned)
        if index not in self._seen:
            self._seen.add(index)
            name, digest = self._skeleton.block_name(index), tensors_digest(tensors)
            check_finite(tensors, f"{name}.")
            check_known(self._digests, name, digest)
            self._digests[name] = digest
        return tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)
