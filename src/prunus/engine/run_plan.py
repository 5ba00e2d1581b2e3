"""A checked run of blocks: the facts that are decided before any work, and what its blocks need.

Every command that takes calibration windows through a model block by block has such a plan. It is
frozen, and each command adds its own facts. `prunus.engine.run_facts` decides what all share.
`Memory` has the budgets and how each block is walked, and is a value of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from prunus.engine.block_memory import (
    CHUNK_TOKENS,
    BlockMemory,
    Memory,
    activation_bytes,
    paused_bytes,
    transient_bytes,
)
from prunus.engine.run_options import RunOptions, WindowOptions
from prunus.engine.run_record import BlockwiseRecord, Walk
from prunus.hardware.machine import ROOM_TO_KEEP, process_memory
from prunus.hardware.numerics import LARGEST, check_finite
from prunus.methods.statistics import Needs, statistics_bytes
from prunus.model.skeleton import Skeleton
from prunus.model.source import ModuleSource, OpenModel, WeightSource, tensors_digest

#: Temporaries per weight of a linear while it is pruned: the float32 weight and score, the sorted
#: copy of the score, and the result in the checkpoint's 2-byte dtype.
BYTES_PER_PRUNED_WEIGHT = 14


@dataclass(frozen=True, kw_only=True)
class RunPlan(OpenModel):
    """An open model with the decisions of one run that concern it and its windows.

    Attributes:
        recipe: The options that decide the bytes of the result.
        options: The options that only decide how the work is done.
        dtype: The dtype of the forward passes.
        dtype_reason: Why it is that dtype, in words.
        batch: Calibration windows per forward pass.
        processes: How many processes work on the run.
        memory: The budgets, and what each block needs and how it is walked, once measured.
        needs: The statistics of each linear's inputs that the run collects.
        needs_inputs: Whether the run reads calibration windows at all.
        walks_windows: Whether all windows run through the blocks. A measurement takes a few alone.
    """

    recipe: WindowOptions
    options: RunOptions
    dtype: torch.dtype
    dtype_reason: str
    batch: int
    processes: int
    memory: Memory
    needs: Needs
    needs_inputs: bool
    walks_windows: bool = True

    @property
    def given_sha256(self) -> dict[str, str | None]:
        """Hashes of the user's own code, by their fields of `WindowInputs`; empty without any."""
        return {}

    def disk_bytes(self, choice: Any = None) -> int:
        """Bytes of the result and of spilled hidden states; `choice` has types, if any."""
        return self.stored_bytes + self.memory.spilled_bytes

    def measuring_bytes(self) -> int:
        """Bytes of a measurement before the first block; 0 without one."""
        return 0

    @property
    def keeps_freed_memory(self) -> bool:
        """Whether the process keeps the memory that it frees; see `keep_freed_memory`.

        What is kept has gaps between tensors, so there must be a third more than the run takes.
        """
        memory = self.memory
        if not memory.on_host or not memory.blocks:
            return False
        return max(memory.peak_bytes(), self.measuring_bytes()) <= ROOM_TO_KEEP * memory.host_budget

    def describe(self, choice: Any = None) -> dict[str, Any]:
        """The plan as JSON values; `choice` has types, if they are chosen. These need a word:

        - `batch`: windows per forward pass;
        - `hidden_states`: where they are between blocks: memory, pinned host memory or file;
        - `blocks_in_lockstep`: how many blocks all windows run through at once;
        - `least_memory_bytes`: what the run needs, with what this process holds already;
        - `peak_memory_bytes`: what it takes at most of the memory that it may use, which saves
          time;
        - `file_bytes`: the weights of the result, or the most that they may take;
        - `disk_bytes`: the same with temporary files.
        """
        memory, blocks, held = self.memory, range(len(self.skeleton)), process_memory()
        least, peak = (
            max(nbytes, self.measuring_bytes()) + held
            for nbytes in (memory.least_bytes, memory.peak_bytes())
        )
        location = "memory" if memory.hidden_states_stay else "pinned host memory"
        return {
            "blocks": len(blocks),
            "dtype": str(self.dtype).removeprefix("torch."),
            "dtype_reason": self.dtype_reason,
            "device": str(self.device),
            "batch": self.batch,
            "bos": self.recipe.bos,
            "hidden_states": "file" if memory.spills else location,
            "blocks_in_lockstep": sum(memory.fits_lockstep(index) for index in blocks),
            "least_memory_bytes": least,
            "peak_memory_bytes": peak,
            "file_bytes": self.stored_bytes,
            "disk_bytes": self.disk_bytes(),
        }

    @property
    def batches(self) -> int:
        """Batches of calibration windows, over all processes."""
        return -(-self.recipe.samples // self.batch)

    @property
    def windows(self) -> int:
        """The largest number of windows that any rank holds. Ranks split the windows by batches."""
        return min(self.recipe.samples, -(-self.batches // self.processes) * self.batch)

    @property
    def tokens(self) -> int:
        """Tokens of all calibration windows, as the first block sees them."""
        return self.recipe.samples * self.skeleton.window_shape(0, self.recipe.seqlen)[0]

    @property
    def walks(self) -> list[Walk]:
        """How the windows run through each block; lockstep and replay give the same bits."""
        blocks = range(len(self.skeleton))
        return ["lockstep" if self.memory.fits_lockstep(index) else "replay" for index in blocks]


def check_memory(plan: RunPlan) -> None:
    """Check that every block fits with its hidden states elsewhere and one batch in flight.

    Raises:
        ValueError: A block does not fit; says what it needs and what the budget is.
    """
    needed = max(block.minimum for block in plan.memory.blocks)
    if plan.memory.budget < needed:
        held = process_memory()
        raise ValueError(
            f"a block needs {(needed + held) / 1e9:.2f} GB with one batch of windows "
            f"in flight ({plan.batch} × {plan.recipe.seqlen} tokens); the memory budget is "
            f"{(plan.memory.budget + held) / 1e9:.2f} GB. Raise `memory`, or lower `batch` or "
            "`seqlen`"
        )


_Plan = TypeVar("_Plan", bound=RunPlan)


def with_memory(
    plan: _Plan, *, dense: bool, trained: Collection[int], extra: Sequence[int]
) -> _Plan:
    """The plan with what its blocks need, from shapes alone, which fits its budgets.

    Args:
        plan: The run.
        dense: Whether batches also run through the dense model.
        trained: The blocks that are trained after they are changed.
        extra: Per block, bytes of temporaries beyond those that every run has.

    Raises:
        ValueError: A block does not fit; see `check_memory`.
    """
    blocks, source = range(len(plan.skeleton)), plan.source
    outside = 0
    if not isinstance(source, ModuleSource):
        outside = source.checkpoint.nbytes(source.outside_keys())
    memory = replace(
        plan.memory,
        blocks=tuple(
            _block_memory(plan, index, dense, index in trained, extra[index]) for index in blocks
        ),
        stored_nbytes=tuple(map(source.block_nbytes, blocks)),
        outside=outside,
    )
    plan = replace(plan, memory=memory)
    check_memory(plan)
    return plan


def _block_memory(plan: RunPlan, index: int, dense: bool, trained: bool, extra: int) -> BlockMemory:
    linears, itemsize = plan.skeleton.linears(index), plan.dtype.itemsize
    window_tokens, hidden = plan.skeleton.window_shape(index, plan.recipe.seqlen)
    tokens = plan.windows * window_tokens
    batch_tokens = min(plan.batch * window_tokens, tokens)
    widest = max(max(linear.shape) for linear in linears)
    parameters = sum(p.numel() for p in plan.skeleton.blocks[index].parameters())
    # The hidden states of the dense model are kept next to those of the changed one.
    models = 2 if dense else 1
    streams = plan.walks_windows * models
    # The temporaries while a linear changes, and its statistics.
    largest = max(linear.shape[0] * linear.shape[1] for linear in linears)
    inputs = max(linear.shape[1] for linear in linears)
    working = BYTES_PER_PRUNED_WEIGHT * largest + statistics_bytes(inputs, plan.needs) + extra
    if plan.needs == "gram":
        # Solvers hold six float32 matrices like the weight, and six like the Gram matrix, or three
        # of the latter in float64.
        working += 6 * 4 * largest + 6 * 4 * inputs**2
    transient = plan.walks_windows * transient_bytes(batch_tokens, hidden, widest, itemsize)
    if trained:
        # Seven float32 tensors per parameter: the weight, its mask, its gradient, Adam's two
        # moments, a copy of the start and a copy of the best so far.
        working += 7 * 4 * parameters
        heads = int(getattr(plan.source.config.get_text_config(), "num_attention_heads", 1) or 1)
        transient += activation_bytes(batch_tokens, window_tokens, hidden, widest, heads, 4)
        if plan.skeleton.is_in_front_of_head(index):
            # The head, and for some tokens the logits of both models; see `divergence_loss`.
            per_token = hidden * itemsize + 24 * CHUNK_TOKENS * plan.batch
            transient += plan.skeleton.vocabulary_weights.rows * per_token
    return BlockMemory(
        weights=2 * plan.source.block_nbytes(index) + models * parameters * itemsize,
        working=working,
        hidden=streams * tokens * hidden * itemsize,
        paused=streams * paused_bytes(tokens, hidden, widest, itemsize),
        transient=transient,
    )


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


def check_known(digests: Mapping[str, str], block: str, digest: str) -> None:
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


def check_blocks(plan: RunPlan, record: BlockwiseRecord) -> None:
    """Check that the source still has the blocks that a finished result was made from.

    Args:
        plan: The run.
        record: The record of the result.

    Raises:
        FileExistsError: A block of the source is another one; names it.
    """
    digests = dict(record.measured)
    for position, block in enumerate(record.blocks):
        # A smaller model has some of the blocks of the source.
        name = plan.skeleton.block_name(getattr(block, "made_from", position))
        digests[name] = block.input_sha256
    for index in range(len(plan.skeleton)):
        if (name := plan.skeleton.block_name(index)) in digests:
            check_known(digests, name, tensors_digest(plan.source.block(index)))


class HashedSource:
    """Reads blocks of another source, and notes or compares their hashes the first time.

    All other attributes are those of the other source.

    Args:
        source: The source to read from.
        skeleton: The model, for the names of blocks.
        digests: Name of a block -> SHA-256. Missing hashes are added.
    """

    def __init__(self, source: WeightSource, skeleton: Skeleton, digests: dict[str, str]) -> None:
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
            check_finite(tensors, f"{name}.", LARGEST)
            check_known(self._digests, name, digest)
            self._digests[name] = digest
        return tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)
