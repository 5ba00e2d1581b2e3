"""A checked run of blocks: its model, its windows, where the data live, and what fits in memory.

Every command that takes calibration windows through a model block by block has such a job. It adds
what it does to a block. `prunus.engine.plan` makes the part that is the same for all.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from prunus.distributed import Ranks
from prunus.engine.memory import BlockMemory, Memory, paused_bytes, transient_bytes
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
        memory: The budgets, and what each block needs and how it is walked, once measured.
        needs: The statistics of each linear's inputs that the run collects.
        needs_inputs: Whether calibration windows run through the model at all.
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
    memory: Memory
    needs: Needs
    needs_inputs: bool
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

    # What a command says.

    @property
    def runs_dense_stream(self) -> bool:
        """Whether batches also run through the dense model."""
        return False

    def walk(self, index: int) -> Walk:
        """How the windows run through block `index`; lockstep and replay give the same bits."""
        return "lockstep" if self.memory.fits_lockstep(index) else "replay"

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
        """Fill in what the blocks need, from shapes alone."""
        blocks, source, outside = range(len(self.skeleton)), self.source, 0
        if not isinstance(source, ModuleSource):
            outside = source.checkpoint.nbytes(source.outside_keys())
        self.memory = replace(
            self.memory,
            blocks=tuple(map(self._block_memory, blocks)),
            stored=tuple(map(source.block_nbytes, blocks)),
            outside=outside,
        )

    def peak_bytes(self) -> int:
        """The largest need of the run on its device, in bytes."""
        return self.memory.peak_bytes()

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

    def file_bytes(self) -> int:
        """Bytes of the weights of the result; 0 for a loaded model, which has no file."""
        if isinstance(self.source, ModuleSource):
            return 0
        return self.source.checkpoint.nbytes(self.source.checkpoint.tensors)

    def disk_bytes(self) -> int:
        """Bytes of the result, with the file of spilled hidden states next to it."""
        if isinstance(self.source, ModuleSource):
            return 0
        return self.file_bytes() + self.memory.spilled_bytes


#: Temporaries per weight of a linear while it is pruned: the float32 weight and score, the sorted
#: copy of the score, and the result in the checkpoint's 2-byte dtype.
BYTES_PER_PRUNED_WEIGHT = 14


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
