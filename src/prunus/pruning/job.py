"""A checked run: what is pruned, how, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.hardware.memory import resident_memory
from prunus.hardware.numerics import native_bfloat16
from prunus.methods import Method
from prunus.methods.refine.dense_targets import drift_is_worthwhile
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.pruning.block.dense_stream import drift_stride_for
from prunus.pruning.block.linear import LinearSettings
from prunus.pruning.block.permute import find_folds
from prunus.pruning.cost import BlockCost, estimate_seconds
from prunus.pruning.recipe import MEASURED_ALLOCATIONS, Recipe
from prunus.pruning.reconstruction.schedule import ReconstructionSettings
from prunus.pruning.records import Walk

__all__ = ["PruningJob", "RunOptions"]


@dataclass(frozen=True)
class RunOptions:
    """How the work is done, as far as it does not decide the bytes of the result.

    Attributes:
        device: auto, cpu, cuda or cuda:i.
        memory: budget in bytes for the whole process, or None for what is free.
        data_dir: local mirror of the calibration corpora.
        tokenizer: of the model, or its image processor; loaded from its folder where it is None.
        input_ids: (samples, seqlen) token ids, or pixel values (samples, channels, height, width), instead of a source.
        trust_remote_code: let transformers run code that comes with the checkpoint.
        ranks: processes that work on the run together; None for those that torchrun started, if it did.
        rank_timeout: seconds after which one of them that gives no sign of life counts as lost; None for the default.
    """

    device: str = "auto"
    memory: int | None = None
    data_dir: Path | None = None
    tokenizer: Any = None
    input_ids: torch.Tensor | None = None
    trust_remote_code: bool = False
    ranks: Ranks | None = None
    rank_timeout: float | None = None


@dataclass
class PruningJob:
    """A checked run: what is pruned, how, and what it will cost.

    `budget` is the memory, in bytes, where blocks run; `host_budget` what the host has. On a CPU they are one.
    """

    recipe: Recipe
    options: RunOptions
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
    costs: list[BlockCost] = field(default_factory=list)

    @property
    def ranks(self) -> Ranks:
        """Who works on the run."""
        return self.options.ranks or SINGLE_PROCESS

    @property
    def windows(self) -> int:
        """The most calibration windows that any rank has; they are shared out in whole batches."""
        return min(self.recipe.samples, -(-self.batches // self.ranks.size) * self.batch)

    @property
    def batches(self) -> int:
        """Of calibration windows, of all ranks."""
        return -(-self.recipe.samples // self.batch)

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration windows have to go through the model at all."""
        return needs_inputs(self.recipe, self.linear_settings.method)

    @property
    def runs_dense_stream(self) -> bool:
        """Whether the dense model's hidden states go along."""
        return self.linear_settings.method.needs_drift or self.recipe.reconstructs

    @property
    def tokens(self) -> int:
        """Of all calibration windows, in the first block."""
        return self.recipe.samples * self.skeleton.window_shape(0, self.recipe.seqlen)[0]

    def uses_dense_target(self, in_features: int) -> bool:
        """Whether a linear with so many inputs is told what the dense model gives it."""
        return self.linear_settings.method.needs_drift and drift_is_worthwhile(
            in_features, self.tokens
        )

    @property
    def drift_stride(self) -> int:
        """One batch in so many goes through the dense model too: all where some are held out, or blocks matched."""
        method = self.linear_settings.method
        if method.needs_held_out or self.recipe.reconstruct == "all" or not method.needs_drift:
            return 1
        blocks = map(self.skeleton.linears, range(len(self.skeleton)))
        widths = (linear.shape[1] for linears in blocks for linear in linears)
        stride = drift_stride_for(
            self.tokens, max(filter(self.uses_dense_target, widths), default=1)
        )
        # Matching needs two: one to learn from, one to judge by.
        return max(1, min(stride, self.batches - 1)) if self.recipe.reconstructs else stride

    @property
    def free_orders(self) -> dict[str, str] | None:
        """Full name of each linear -> what would follow an order of its inputs, or "" where they keep theirs.

        By names and shapes; None where no order is asked for. The run tries it on the first batch before it holds to it.
        """
        if not self.recipe.permute:
            return None
        heads = getattr(self.source.config.get_text_config(), "num_attention_heads", None)
        m = self.linear_settings.pattern.m
        assert m is not None
        found = {}
        for index, names in enumerate(self.selected):
            folds = find_folds(self.skeleton.linears(index), heads, m)
            for name in names:
                follow = (
                    ", ".join(p.name for p in folds[name][0].producers) if name in folds else ""
                )
                found[f"{self.skeleton.block_name(index)}.{name}"] = follow
        return found

    @property
    def reconstruction(self) -> ReconstructionSettings | None:
        """How blocks are matched to the dense ones; products in bfloat16 where the processor has it."""
        if not self.recipe.reconstructs:
            return None
        fast = self.device.type == "cuda" or native_bfloat16()
        dtype = torch.bfloat16 if fast and self.dtype != torch.float16 else torch.float32
        last_alone = self.recipe.reconstruct != "all"
        return ReconstructionSettings(
            self.recipe.reconstruct_epochs, self.recipe.reconstruct_lr, dtype, last_alone
        )

    @property
    def reference_order(self) -> bool:
        """Whether the original's order of operations is kept, on one thread: its sums depend on their number."""
        return self.linear_settings.options.reference_order

    @property
    def hidden_states_stay(self) -> bool:
        """Whether hidden states stay where the blocks run: one batch in flight fits beside them."""
        return all(cost.replay_in_memory <= self.budget for cost in self.costs)

    @property
    def spills(self) -> bool:
        """Whether hidden states go to a file: neither the device nor the host has room for them."""
        if self.hidden_states_stay:
            return False
        return (
            self.device.type == "cpu" or max(cost.hidden for cost in self.costs) > self.host_budget
        )

    def fits_lockstep(self, index: int) -> bool:
        """Whether block `index` can be walked with all its batches paused in memory."""
        cost = self.costs[index]
        return (
            cost.lockstep_in_memory if self.hidden_states_stay else cost.lockstep_spilled
        ) <= self.budget

    def walk(self, index: int) -> Walk:
        """How the windows go through block `index`; lockstep and replay give the same bits."""
        if self.recipe.propagate == "block":
            return "two_pass"
        return "lockstep" if self.fits_lockstep(index) else "replay"

    @property
    def disk(self) -> int:
        """Bytes the result takes, and the spilled hidden states beside it."""
        if isinstance(self.source, ModuleSource):
            return 0
        weights = self.source.checkpoint.nbytes(self.source.checkpoint.tensors)
        return weights + (max(c.hidden for c in self.costs) if self.spills else 0)

    def describe(self) -> dict[str, Any]:
        """The plan in numbers, for `prunus plan`."""
        peak = 0
        for index, cost in enumerate(self.costs):
            lockstep = self.fits_lockstep(index)
            if self.hidden_states_stay:
                need = cost.lockstep_in_memory if lockstep else cost.replay_in_memory
            else:
                need = cost.lockstep_spilled if lockstep else cost.least
            peak = max(peak, need)
        shapes = [
            linear.shape
            for index in range(len(self.skeleton))
            for linear in self.skeleton.linears(index)
            if linear.name in self.selected[index]
        ]
        weights = sum(rows * columns for rows, columns in shapes)
        return {
            "blocks": len(self.skeleton),
            "linears": len(shapes),
            "weights": weights,
            "to_remove": int(weights * self.linear_settings.sparsity),
            "free_orders": self.free_orders,
            "left_dense": {name: list(shape) for name, shape in self.left_dense.items()},
            "dtype": str(self.dtype).removeprefix("torch."),
            "dtype_reason": self.dtype_reason,
            "device": str(self.device),
            "batch": self.batch,
            "hidden_states": "file"
            if self.spills
            else "memory"
            if self.hidden_states_stay
            else "pinned host memory",
            "blocks_in_lockstep": sum(
                self.fits_lockstep(index) for index in range(len(self.skeleton))
            ),
            "peak_memory_bytes": peak + resident_memory(),
            "disk_bytes": self.disk,
            "seconds": estimate_seconds(self),
        }


def needs_inputs(recipe: Recipe, method: Method) -> bool:
    measured = recipe.allocation in MEASURED_ALLOCATIONS
    return method.needs != "none" or recipe.reconstructs or measured
