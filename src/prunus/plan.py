"""Everything that is known, checked and decided before a run does any work.

`prepare` raises for whatever would make the run fail later; `prune` works through the job it returns, and
`prunus plan` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.calibration import check_context
from prunus.costs import block_cost, estimate_seconds
from prunus.engine.companion import one_batch_in
from prunus.engine.folding import find_folds
from prunus.engine.linear import LinearJob
from prunus.engine.memory import BlockCost
from prunus.engine.precision import decide_dtype
from prunus.engine.retouch import RetouchJob
from prunus.machine import available_memory, memory_budget, resident_memory
from prunus.manifest import Walk
from prunus.methods import METHODS, Method, Options, check_options, compose, default_group
from prunus.methods.targets import tells_drift
from prunus.model.checkpoint import resolve_folder
from prunus.model.device import choose_device
from prunus.model.kinds import IMAGES, kind_of
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.patterns import Pattern, check_shape
from prunus.products import native_bfloat16
from prunus.ranks import ALONE, Ranks
from prunus.recipe import MEASURED_ALLOCATIONS, Recipe
from prunus.selection import check_inputs, select

__all__ = ["Job", "RunOptions", "prepare"]

# Tokens of one forward pass: long enough for large matrix products, short enough to stay in the cache.
_TOKENS_PER_BATCH = 4096


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
class Job:
    """A checked run: what is pruned, how, and what it will cost.

    `budget` is the memory, in bytes, where blocks run; `host_budget` what the host has. On a CPU they are one.
    """

    recipe: Recipe
    options: RunOptions
    source: CheckpointSource | ModuleSource
    skeleton: Skeleton
    linear_job: LinearJob
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    batch: int
    budget: int
    host_budget: int
    targets: list[list[str]]
    left_dense: dict[str, tuple[int, ...]]
    costs: list[BlockCost] = field(default_factory=list)

    @property
    def ranks(self) -> Ranks:
        """Who works on the run."""
        return self.options.ranks or ALONE

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
        return _needs_inputs(self.recipe, self.linear_job.method)

    @property
    def carries_dense(self) -> bool:
        """Whether the dense model's hidden states go along."""
        return self.linear_job.method.needs_drift or self.recipe.matches

    @property
    def tokens(self) -> int:
        """Of all calibration windows, in the first block."""
        return self.recipe.samples * self.skeleton.window_shape(0, self.recipe.seqlen)[0]

    def aims(self, in_features: int) -> bool:
        """Whether a linear with so many inputs is told what the dense model gives it."""
        return self.linear_job.method.needs_drift and tells_drift(in_features, self.tokens)

    @property
    def drift_one_in(self) -> int:
        """One batch in so many goes through the dense model too: all where some are held out, or blocks matched."""
        method = self.linear_job.method
        if method.holds_out or self.recipe.match_blocks or not method.needs_drift:
            return 1
        blocks = map(self.skeleton.linears, range(len(self.skeleton)))
        widths = (linear.shape[1] for linears in blocks for linear in linears)
        one_in = one_batch_in(self.tokens, max(filter(self.aims, widths), default=1))
        # Matching needs two: one to learn from, one to judge by.
        return max(1, min(one_in, self.batches - 1)) if self.recipe.matches else one_in

    @property
    def free_orders(self) -> dict[str, str] | None:
        """Full name of each linear -> what would follow an order of its inputs, or "" where they keep theirs.

        By names and shapes; None where no order is asked for. The run tries it on the first batch before it holds to it.
        """
        if not self.recipe.permute:
            return None
        heads = getattr(self.source.config.get_text_config(), "num_attention_heads", None)
        m = self.linear_job.pattern.m
        assert m is not None
        found = {}
        for index, names in enumerate(self.targets):
            folds = find_folds(self.skeleton.linears(index), heads, m)
            for name in names:
                follow = ", ".join(p.name for p in folds[name][0].producers) if name in folds else ""
                found[f"{self.skeleton.block_name(index)}.{name}"] = follow
        return found

    @property
    def retouch_job(self) -> RetouchJob | None:
        """How blocks are matched to the dense ones; products in bfloat16 where the processor has it."""
        if not self.recipe.matches:
            return None
        fast = self.device.type == "cuda" or native_bfloat16()
        dtype = torch.bfloat16 if fast and self.dtype != torch.float16 else torch.float32
        last_alone = not self.recipe.match_blocks
        return RetouchJob(self.recipe.match_passes, self.recipe.match_rate, dtype, last_alone)

    @property
    def as_original(self) -> bool:
        """Whether the original's order of operations is kept, on one thread: its sums depend on their number."""
        return self.linear_job.options.as_original

    @property
    def hidden_stay(self) -> bool:
        """Whether hidden states stay where the blocks run: one batch in flight fits beside them."""
        return all(cost.replay_in_memory <= self.budget for cost in self.costs)

    @property
    def spills(self) -> bool:
        """Whether hidden states go to a file: neither the device nor the host has room for them."""
        if self.hidden_stay:
            return False
        return self.device.type == "cpu" or max(cost.hidden for cost in self.costs) > self.host_budget

    def fits_lockstep(self, index: int) -> bool:
        """Whether block `index` can be walked with all its batches paused in memory."""
        cost = self.costs[index]
        return (cost.lockstep_in_memory if self.hidden_stay else cost.lockstep_spilled) <= self.budget

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
            if self.hidden_stay:
                need = cost.lockstep_in_memory if lockstep else cost.replay_in_memory
            else:
                need = cost.lockstep_spilled if lockstep else cost.least
            peak = max(peak, need)
        shapes = [
            linear.shape
            for index in range(len(self.skeleton))
            for linear in self.skeleton.linears(index)
            if linear.name in self.targets[index]
        ]
        weights = sum(rows * columns for rows, columns in shapes)
        return {
            "blocks": len(self.skeleton),
            "linears": len(shapes),
            "weights": weights,
            "to_remove": int(weights * self.linear_job.sparsity),
            "free_orders": self.free_orders,
            "left_dense": {name: list(shape) for name, shape in self.left_dense.items()},
            "dtype": str(self.dtype).removeprefix("torch."),
            "dtype_reason": self.dtype_reason,
            "device": str(self.device),
            "batch": self.batch,
            "hidden_states": "file"
            if self.spills
            else "memory"
            if self.hidden_stay
            else "pinned host memory",
            "blocks_in_lockstep": sum(self.fits_lockstep(index) for index in range(len(self.skeleton))),
            "peak_memory_bytes": peak + resident_memory(),
            "disk_bytes": self.disk,
            "seconds": estimate_seconds(self),
        }


def prepare(
    model: str | Path | nn.Module, recipe: Recipe, options: RunOptions, decided_dtype: str | None = None
) -> Job:
    """Check everything that can be checked without reading weights or text, and decide what is left open.

    `decided_dtype` is what dtype "auto" came to in the run that is resumed: it holds without a second trial.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError, OSError: see the functions that are called; each
            message names what was given, what is wrong and what to do.
    """
    published = METHODS[recipe.method]
    # Whatever option of a method a recipe has goes by the same name.
    shared = {each.name for each in fields(Options)} & set(Recipe.model_fields)
    method_options = Options(**{name: getattr(recipe, name) for name in shared})
    method = compose(published, method_options)
    if recipe.propagate == "block" and method is published and recipe.method in ("sparsegpt", "obs"):
        method_options = replace(method_options, as_original=True)
    group = recipe.group if recipe.group is not None else default_group(recipe.method, method_options)
    pattern = Pattern.parse(recipe.pattern, group)
    check_options(recipe.method, pattern, recipe.sparsity, method_options)
    device = choose_device(options.device, model if isinstance(model, nn.Module) else None)
    source: CheckpointSource | ModuleSource
    if isinstance(model, nn.Module):
        source = ModuleSource(model)
    else:
        source = CheckpointSource(resolve_folder(model), options.trust_remote_code)
    if _needs_inputs(recipe, method):
        check_inputs(kind_of(source.config), recipe, options.input_ids, options.data_dir)
    # Structure and names are checked on a skeleton in the stored dtype, before a trial may cost time.
    skeleton = Skeleton(source.config, source.stored_dtype, options.trust_remote_code)
    source.bind(skeleton)
    if skeleton.kind is not IMAGES:
        check_context(skeleton.positions, recipe.seqlen, method.needs)
    if recipe.head:
        head = skeleton.head()
        check_shape(pattern, head.shape, head.name)
    targets, left_dense = select(skeleton, recipe, pattern)
    wanted = decided_dtype if recipe.dtype == "auto" and decided_dtype else recipe.dtype
    dtype, reason = decide_dtype(
        wanted, source, device, method.needs, options.trust_remote_code, ridged=method.ridged
    )
    if dtype != source.stored_dtype:
        skeleton = Skeleton(source.config, dtype, options.trust_remote_code)
        source.bind(skeleton)
    # For matching, a step is a batch: one window, or half as many as otherwise where it is for one block alone.
    one_each = method_options.as_original or recipe.match_blocks
    most = 1 if one_each else _TOKENS_PER_BATCH // skeleton.window_shape(0, recipe.seqlen)[0]
    batch = recipe.batch or max(1, min(recipe.samples, most) // (2 if recipe.matches else 1))
    if recipe.matches and recipe.samples <= batch:
        raise ValueError(
            f"matching trains on some batches and judges by others: {recipe.samples} windows in batches of {batch} "
            "are one; give more --samples or a smaller --batch"
        )
    ranks = options.ranks or ALONE
    budget = options.memory
    if budget is None:
        budget = available_memory() // ranks.on_host + resident_memory()
    job = Job(
        recipe=recipe,
        options=options,
        source=source,
        skeleton=skeleton,
        linear_job=LinearJob(method, pattern, recipe.sparsity, method_options),
        device=device,
        dtype=dtype,
        dtype_reason=reason,
        batch=batch,
        budget=memory_budget(device, None) if device.type == "cuda" else budget - resident_memory(),
        host_budget=budget - resident_memory(),
        targets=targets,
        left_dense=left_dense,
    )
    job.costs = [block_cost(job, index) for index in range(len(skeleton))]
    least = max(cost.least for cost in job.costs)
    if job.budget < least:
        raise ValueError(
            f"a block needs {(least + resident_memory()) / 1e9:.2f} GB with one batch of {batch} windows of "
            f"{recipe.seqlen} tokens in flight; the memory budget is "
            f"{(job.budget + resident_memory()) / 1e9:.2f} GB. Raise --memory or lower --batch or --seqlen"
        )
    return job


def _needs_inputs(recipe: Recipe, method: Method) -> bool:
    measured = recipe.allocation in MEASURED_ALLOCATIONS
    return method.needs != "none" or recipe.matches or measured
