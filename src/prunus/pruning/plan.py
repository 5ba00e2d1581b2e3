"""Everything that is known, checked and decided before a run does any work.

`plan_run` raises for whatever would make the run fail later; `prune` works through the job it returns, and
`prunus plan` prints it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from torch import nn

from prunus.calibration import check_context
from prunus.distributed import SINGLE_PROCESS
from prunus.hardware.memory import available_memory, memory_budget, resident_memory
from prunus.methods import METHODS, MethodOptions, check_options, compose, default_group
from prunus.methods.patterns import Pattern, check_shape
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.device import choose_device
from prunus.model.kinds import IMAGES, kind_of
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.pruning.block.linear import LinearSettings
from prunus.pruning.compute_dtype import decide_dtype
from prunus.pruning.cost import block_cost
from prunus.pruning.job import PruningJob, RunOptions, needs_inputs
from prunus.pruning.recipe import Recipe
from prunus.pruning.selection import check_inputs, select_linears

__all__ = ["plan_run"]

# Tokens of one forward pass: long enough for large matrix products, short enough to stay in the cache.
_TOKENS_PER_BATCH = 4096


def plan_run(
    model: str | Path | nn.Module,
    recipe: Recipe,
    options: RunOptions,
    decided_dtype: str | None = None,
) -> PruningJob:
    """Check everything that can be checked without reading weights or text, and decide what is left open.

    `decided_dtype` is what dtype "auto" came to in the run that is resumed: it holds without a second trial.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError, OSError: see the functions that are called; each
            message names what was given, what is wrong and what to do.
    """
    published = METHODS[recipe.method]
    # Whatever option of a method a recipe has goes by the same name.
    shared = {each.name for each in fields(MethodOptions)} & set(Recipe.model_fields)
    method_options = MethodOptions(**{name: getattr(recipe, name) for name in shared})
    method = compose(published, method_options)
    if (
        recipe.propagate == "block"
        and method is published
        and recipe.method in ("sparsegpt", "obs")
    ):
        method_options = replace(method_options, reference_order=True)
    group = (
        recipe.group if recipe.group is not None else default_group(recipe.method, method_options)
    )
    pattern = Pattern.parse(recipe.pattern, group)
    check_options(recipe.method, pattern, recipe.sparsity, method_options)
    device = choose_device(options.device, model if isinstance(model, nn.Module) else None)
    source: CheckpointSource | ModuleSource
    if isinstance(model, nn.Module):
        source = ModuleSource(model)
    else:
        source = CheckpointSource(resolve_folder(model), options.trust_remote_code)
    if needs_inputs(recipe, method):
        check_inputs(kind_of(source.config), recipe, options.input_ids, options.data_dir)
    # Structure and names are checked on a skeleton in the stored dtype, before a trial may cost time.
    skeleton = Skeleton(source.config, source.stored_dtype, options.trust_remote_code)
    source.bind(skeleton)
    if skeleton.kind is not IMAGES:
        check_context(skeleton.positions, recipe.seqlen, method.needs)
    if recipe.head:
        head = skeleton.head()
        check_shape(pattern, head.shape, head.name)
    selected, left_dense = select_linears(skeleton, recipe, pattern)
    wanted = decided_dtype if recipe.dtype == "auto" and decided_dtype else recipe.dtype
    dtype, reason = decide_dtype(
        wanted,
        source,
        device,
        method.needs,
        options.trust_remote_code,
        adds_ridge=method.adds_ridge,
    )
    if dtype != source.stored_dtype:
        skeleton = Skeleton(source.config, dtype, options.trust_remote_code)
        source.bind(skeleton)
    # For matching, a step is a batch: one window, or half as many as otherwise where it is for one block alone.
    one_each = method_options.reference_order or recipe.reconstruct == "all"
    most = 1 if one_each else _TOKENS_PER_BATCH // skeleton.window_shape(0, recipe.seqlen)[0]
    batch = recipe.batch or max(1, min(recipe.samples, most) // (2 if recipe.reconstructs else 1))
    if recipe.reconstructs and recipe.samples <= batch:
        raise ValueError(
            f"matching trains on some batches and judges by others: {recipe.samples} windows in batches of {batch} "
            "are one; give more --samples or a smaller --batch"
        )
    ranks = options.ranks or SINGLE_PROCESS
    budget = options.memory
    if budget is None:
        budget = available_memory() // ranks.local_size + resident_memory()
    job = PruningJob(
        recipe=recipe,
        options=options,
        source=source,
        skeleton=skeleton,
        linear_settings=LinearSettings(method, pattern, recipe.sparsity, method_options),
        device=device,
        dtype=dtype,
        dtype_reason=reason,
        batch=batch,
        budget=memory_budget(device, None) if device.type == "cuda" else budget - resident_memory(),
        host_budget=budget - resident_memory(),
        selected=selected,
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
