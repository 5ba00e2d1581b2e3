"""A checked run: what is pruned, how, and where its data live.

`plan.py` makes the job, `run.py` follows it, and `cost.py` estimates what it takes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks, process_group
from prunus.hardware.numerics import native_bfloat16
from prunus.methods import Method
from prunus.methods.refine.dense_targets import drift_is_worthwhile
from prunus.model.linears import Linear
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.pruning.block.dense_stream import drift_stride_for
from prunus.pruning.block.settings import BlockSettings, LinearSettings
from prunus.pruning.recipe import Recipe
from prunus.pruning.reconstruction.schedule import ReconstructionSettings
from prunus.pruning.records import Walk
from prunus.runs.block_memory import BlockMemory

__all__ = ["PruningJob", "RunOptions", "needs_inputs"]


@dataclass(frozen=True)
class RunOptions:
    """How the work is done, as far as it does not decide the bytes of the result.

    Attributes:
        device: auto, cpu, cuda or cuda:i.
        memory: Memory budget of the whole process in bytes, on the host and on the device alike;
            None for the free memory.
        data_dir: Folder with local copies of the calibration corpora.
        tokenizer: The model's tokenizer or image processor; None loads it from the checkpoint.
        input_ids: Calibration data instead of a named source: token ids (samples, seqlen), or
            pixel values (samples, channels, height, width).
        texts: Texts, rows of a data set or chats instead of a named source; see
            `prunus.calibration.texts`.
        announce: Called with what is being prepared, before the first block; None to be silent.
        trust_remote_code: Let transformers run code that comes with the checkpoint.
        ranks: The processes that work on this run; None for those that torchrun started, if any.
        rank_timeout: A process without a sign of life counts as lost after this many seconds;
            None for the default.
    """

    device: str = "auto"
    memory: int | None = None
    data_dir: Path | None = None
    tokenizer: Any = None
    input_ids: torch.Tensor | None = None
    texts: Sequence[Any] | None = None
    announce: Callable[[str], None] | None = None
    trust_remote_code: bool = False
    ranks: Ranks | None = None
    rank_timeout: float | None = None

    def tell(self, message: str) -> None:
        """Announce what comes next; only the first of several processes does so."""
        if self.announce is not None and (self.ranks or SINGLE_PROCESS).rank == 0:
            self.announce(message)

    @contextlib.contextmanager
    def with_ranks(self) -> Iterator[RunOptions]:
        """The options with the processes that torchrun started, unless they name processes."""
        if self.ranks is not None:
            yield self
            return
        with process_group(self.rank_timeout) as ranks:
            yield replace(self, ranks=ranks)


@dataclass
class PruningJob:
    """The decisions of one run.

    Attributes:
        recipe: The options that decide the bytes of the result.
        options: The options that only decide how the work is done.
        model_name: The model as the user named it; the class name of a loaded model.
        source: The dense weights.
        skeleton: The model without weights, in the dtype of the computation.
        linear_settings: How every linear is pruned.
        device: Where blocks run.
        dtype: The dtype of the forward passes, and in `dtype_reason` why.
        batch: Calibration windows per forward pass.
        budget: Memory for the run on `device`, in bytes.
        host_budget: Memory for the run on the host, in bytes. On a CPU both budgets are the same.
        selected: Per block the relative names of the linears to prune.
        left_dense: The weights of the blocks that stay dense: full name -> shape.
        block_memory: The memory that each block needs.
    """

    recipe: Recipe
    options: RunOptions
    model_name: str
    source: CheckpointSource | ModuleSource
    skeleton: Skeleton
    linear_settings: LinearSettings
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    batch: int
    budget: int
    host_budget: int
    selected: list[list[str]]
    left_dense: dict[str, tuple[int, ...]]
    block_memory: list[BlockMemory] = field(default_factory=list)

    @property
    def ranks(self) -> Ranks:
        """The processes that work on the run."""
        return self.options.ranks or SINGLE_PROCESS

    def selected_linears(self) -> dict[str, Linear]:
        """The linears to prune, block by block: full name -> linear."""
        return {
            f"{self.skeleton.block_name(index)}.{linear.name}": linear
            for index, names in enumerate(self.selected)
            for linear in self.skeleton.linears(index)
            if linear.name in names
        }

    # The calibration data.

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration windows go through the model at all."""
        return needs_inputs(self.recipe, self.linear_settings.method)

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

    # The dense model beside the pruned one.

    @property
    def runs_dense_stream(self) -> bool:
        """Whether batches also run through the dense model."""
        return self.block_settings({}).runs_dense_stream

    def uses_dense_target(self, in_features: int) -> bool:
        """Whether a linear with this many inputs also uses its inputs in the dense model."""
        return self.linear_settings.method.needs_drift and drift_is_worthwhile(
            in_features, self.tokens
        )

    @functools.cached_property
    def drift_stride(self) -> int:
        """One of this many batches also runs through the dense model."""
        method, blocks_trained = self.linear_settings.method, self.recipe.reconstruct
        if method.needs_held_out or blocks_trained == "all":
            return 1
        if not method.needs_drift and blocks_trained != "quick":
            return 1
        blocks = map(self.skeleton.linears, range(len(self.skeleton)))
        widths = (linear.shape[1] for linears in blocks for linear in linears)
        stride = drift_stride_for(
            self.tokens, max(filter(self.uses_dense_target, widths), default=1)
        )
        # Reconstruction needs two batches: one to train on and one for validation.
        return max(1, min(stride, self.batches - 1)) if self.recipe.reconstructs else stride

    @property
    def dense_batches(self) -> int:
        """Batches that also run through the dense model, over all ranks."""
        return -(-self.batches // self.drift_stride)

    @property
    def reconstruction(self) -> ReconstructionSettings | None:
        """How blocks are reconstructed, or None.

        Training multiplies in bfloat16 where the hardware does so natively. It multiplies in
        float32 everywhere else, and for float16 models, on CUDA as TF32.
        """
        if not self.recipe.reconstructs:
            return None
        fast = self.device.type == "cuda" or native_bfloat16()
        dtype = torch.bfloat16 if fast and self.dtype != torch.float16 else torch.float32
        last_alone = self.recipe.reconstruct == "last"
        return ReconstructionSettings(
            self.recipe.reconstruct_epochs, self.recipe.reconstruct_lr, dtype, last_alone
        )

    def block_settings(self, sparsities: Mapping[str, float]) -> BlockSettings:
        """How every block is pruned.

        Args:
            sparsities: The sparsity of each linear, by full name; empty if all have the recipe's.
        """
        return BlockSettings(
            linear=self.linear_settings,
            device=self.device,
            sparsities=sparsities,
            min_expert_tokens=self.recipe.min_expert_tokens,
            reconstruction=self.reconstruction,
            drift_stride=self.drift_stride,
            uses_dense_target=self.uses_dense_target,
        )

    # Where the data live and how they move.

    @property
    def reference_order(self) -> bool:
        """Whether sums keep the order of the original SparseGPT code.

        Such a run uses one thread, because the order of a sum depends on the number of threads.
        """
        return self.linear_settings.options.reference_order

    @property
    def hidden_states_stay(self) -> bool:
        """Whether hidden states stay on the device: they fit there beside one batch in flight."""
        return all(
            memory.total(hidden=True, paused=False) <= self.budget for memory in self.block_memory
        )

    @property
    def spills(self) -> bool:
        """Whether hidden states go to a file: neither the device nor the host has room for them."""
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
        """Whether the next block is read and the last one written while one is pruned.

        It takes memory for two blocks more, and changes nothing but the time.
        """
        return not isinstance(self.source, ModuleSource) and all(
            self.host_bytes(index) + self.overlap_bytes(index) <= self.host_budget
            for index in range(len(self.block_memory))
        )

    def overlap_bytes(self, index: int) -> int:
        """Bytes of the block that is read and of the block that is written beside block `index`."""
        beside = [near for near in (index - 1, index + 1) if 0 <= near < len(self.block_memory)]
        return sum(self.source.block_nbytes(near) for near in beside)

    def host_bytes(self, index: int) -> int:
        """Bytes that block `index` needs on the host, with nothing read or written beside it."""
        memory = self.block_memory[index]
        if self.device.type != "cpu":
            return 0 if self.hidden_states_stay or self.spills else memory.hidden
        return memory.total(hidden=self.hidden_states_stay, paused=self.fits_lockstep(index))

    def walk(self, index: int) -> Walk:
        """How the windows go through block `index`; lockstep and replay give the same bits."""
        if self.recipe.propagate == "block":
            return "two_pass"
        return "lockstep" if self.fits_lockstep(index) else "replay"


def needs_inputs(recipe: Recipe, method: Method) -> bool:
    """Whether a recipe uses calibration windows: its method, its allocation or its training does.

    Args:
        recipe: The recipe of the run.
        method: Its method with refinement and weight update; see `prunus.methods.composition`.
    """
    return method.needs != "none" or recipe.reconstructs or recipe.searches
