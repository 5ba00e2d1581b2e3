"""A checked run that changes linears: what is changed and how. `prunus plan` prints it.

Whatever would make a run fail later fails in `plan_run`. The command hands it what it alone knows:

    LinearStep       how each linear is changed
    Storage          how the result is stored

and gets back

    LinearPlan       the decisions of one run, and what follows from them

`select_linears` applies `only` and `ignore` to the linears of a model.
"""

from __future__ import annotations

import functools
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunus.engine.block.dense_stream import drift_stride_for
from prunus.engine.linear_options import LinearOptions
from prunus.engine.run_facts import open_model, run_facts
from prunus.engine.run_options import RunOptions
from prunus.engine.run_plan import RunPlan, windows_per_batch, with_memory
from prunus.engine.run_record import Walk
from prunus.engine.session import SILENT, Session
from prunus.hardware.machine import process_memory
from prunus.hardware.numerics import native_bfloat16
from prunus.methods.allocation import Share, mean_sparsity
from prunus.methods.dense_targets import drift_is_worthwhile
from prunus.methods.patterns import Pattern, check_shape
from prunus.methods.statistics import Needs, statistics_bytes
from prunus.methods.table import Method
from prunus.methods.work import Work
from prunus.model.checkpoint.tensor_files import Checkpoint
from prunus.model.levels import value_bits
from prunus.model.linears import Linear
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource, OpenModel

# To see whether weights were rounded before: about the most matrices that are looked at, and the
# weights at the beginning of each.
_SAMPLED, _SAMPLE = 24, 2**15


class LinearSelection(NamedTuple):
    """The linears of a model, sorted into those that are pruned and the rest.

    Attributes:
        selected: Per block the relative names of the linears to prune.
        left_dense: All other weights with two or more dimensions in the blocks: full name -> shape.
    """

    selected: list[list[str]]
    left_dense: dict[str, tuple[int, ...]]

    def linears(self, skeleton: Skeleton) -> dict[str, Linear]:
        """The linears to prune, block by block: full name -> linear."""
        return {
            name: linear
            for name, (index, linear) in skeleton.all_linears().items()
            if linear.name in self.selected[index]
        }

    def limited(self, skeleton: Skeleton, keeps: Callable[[str], bool]) -> LinearSelection:
        """The selection without the linears for whose full name `keeps` is False."""
        kept = [
            [name for name in names if keeps(f"{skeleton.block_name(index)}.{name}")]
            for index, names in enumerate(self.selected)
        ]
        every = self.linears(skeleton)
        dropped = {f"{name}.weight": x.shape for name, x in every.items() if not keeps(name)}
        return LinearSelection(kept, self.left_dense | dropped)


@dataclass(frozen=True, kw_only=True)
class Storage(ABC):
    """How a result stores its linears, as far as a plan must know.

    Attributes:
        source: The dense weights.
        selection: The linears that are changed.
        measures_loss: Whether the run begins by measuring how the loss depends on each linear, for
            the types of weights or the fit of scales.
        unmatched: What a template and its checkpoint do not have in common, or what the result
            lacks of the checkpoint; see `CompressionRecord`.
        copies: How many files as large as the result a run needs on the disk at once.
        first_share: The least share of first tokens in the inputs of linears that feed attention;
            see `FIRST_SHARE`.
    """

    source: CheckpointSource | ModuleSource
    selection: LinearSelection
    measures_loss: bool = False
    unmatched: Mapping[str, list[str]] = field(default_factory=dict)
    copies: int = 1
    first_share: float = 0.0

    @abstractmethod
    def file_bytes(self, choice: Any = None) -> int:
        """Bytes of the weights of the result; `choice` has types, if they are chosen already."""

    def describe(self, choice: Any = None) -> dict[str, object]:
        """What a plan shows of it, as JSON values."""
        return {}

    @abstractmethod
    def card(self, record: Any) -> str:
        """The model card, README.md, of a run with this record."""

    @abstractmethod
    def config(self, record: Any) -> Mapping[str, object] | None:
        """The content of config.json; None for that of the source."""

    @abstractmethod
    def note_size(self, record: Any, written: Checkpoint) -> None:
        """Enter into the record what takes the bytes of the shards that were written."""


#: Gives every linear a sparsity, full name -> sparsity, from a measurement of the dense model. It
#: is given the plan, the session that hears of it, the windows, the hashes of the blocks that it
#: reads, to which missing ones are added, and the folder for spilled hidden states.
Allocate = Callable[["LinearPlan", Session, Tensor, dict[str, str], Path | None], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class LinearStep:
    """How a run changes each linear: what a command knows and the engine asks for.

    Attributes:
        method: How every linear is changed, with targets and weight updates composed in.
        work: What the run asks of the method. Its sparsity is that of linears without another.
        rule: How the sparsity is distributed over the linears, by name.
        shares: The linears of every sparsity by hand; empty if none is by hand.
        allocate: Gives every linear a sparsity, before the first block; None where the shares and
            `work` do.
        masks: Full name -> bool (out, in), True where a weight becomes zero; None if the method
            chooses its own.
        measuring_bytes: From the plan to the bytes of what is measured before the first block.
        given_sha256: See `RunPlan.given_sha256`.
    """

    method: Method
    work: Work
    rule: str = "uniform"
    shares: Sequence[Share] = ()
    allocate: Allocate | None = None
    masks: Mapping[str, Tensor] | None = None
    measuring_bytes: Callable[[LinearPlan], int] = field(default=lambda plan: 0)
    given_sha256: Mapping[str, str | None] = field(default_factory=dict)


#: Fits a step to the linears that a model has and a recipe selects: their masks, and their
#: sparsities by hand. It returns the step, and the linears that are left to change.
Fit = Callable[[LinearStep, Skeleton, LinearSelection], tuple[LinearStep, LinearSelection]]


@dataclass(frozen=True, kw_only=True)
class LinearPlan(RunPlan):
    """The decisions of one run of prune or compress.

    Attributes:
        recipe: The options that decide the bytes of the result.
        storage: How linears are stored in the result.
        step: How each linear is changed.
    """

    recipe: LinearOptions
    storage: Storage
    step: LinearStep

    @property
    def method(self) -> Method:
        """How every linear is changed."""
        return self.step.method

    @property
    def work(self) -> Work:
        """What the run asks of the method."""
        return self.step.work

    @property
    def selected(self) -> list[list[str]]:
        """Per block the relative names of the linears to prune."""
        return self.storage.selection.selected

    @property
    def left_dense(self) -> dict[str, tuple[int, ...]]:
        """The weights of the blocks that stay dense: full name -> shape."""
        return self.storage.selection.left_dense

    def describe(self, choice: Any = None) -> dict[str, Any]:
        """The plan as JSON values; see `RunPlan.describe`. These values need a word:

        - `to_remove`: weights that become zero, a number;
        - `left_dense`: name of a weight that stays as it is -> its shape;
        - `grid_bits`: bits of the grid that the weights lie on already, or None;
        - `rounded_before`: the same in words; empty where the weights lie on no grid;
        - `unmatched`: "the template" and "the checkpoint" -> what only one of the two has;
          "config.json" -> options that were compared with nothing;
        - `allocation`: the rule, whether it measures the model, the mean sparsity, and for each
          rule by hand its sparsity and its numbers of linears and of weights.
        """
        shapes: list[tuple[int, int]] = [x.shape for x in self.selected_linears().values()]
        weights = sum(rows * columns for rows, columns in shapes)
        return {
            **super().describe(),
            "linears": len(shapes),
            "weights": weights,
            "to_remove": int(weights * self.sparsity),
            "left_dense": {name: list(shape) for name, shape in self.left_dense.items()},
            "grid_bits": self.grid_bits,
            "rounded_before": f"rounded to about {self.grid_bits} bits" if self.grid_bits else "",
            "unmatched": self.storage.unmatched,
            "file_bytes": self.storage.file_bytes(choice),
            "disk_bytes": self.disk_bytes(choice),
            "allocation": {
                "rule": "by hand" if self.step.shares else self.step.rule,
                "measured": self.recipe.measures != "nothing",
                "sparsity": self.sparsity,
                "shares": [
                    {
                        "rule": share.rule,
                        "sparsity": share.sparsity,
                        "linears": len(share.weights),
                        "weights": sum(share.weights.values()),
                    }
                    for share in self.step.shares
                ],
            },
            **self.storage.describe(choice),
        }

    @property
    def sparsity(self) -> float:
        """The mean sparsity that is asked for, over all weights."""
        return mean_sparsity(self.step.shares) if self.step.shares else self.work.sparsity

    @property
    def sparsities(self) -> dict[str, float]:
        """The sparsities by hand: full name of a linear -> sparsity."""
        return {name: share.sparsity for share in self.step.shares for name in share.weights}

    @property
    def given_sha256(self) -> dict[str, str | None]:
        """Hashes of the user's own method, allocation and masks; see `RunPlan.given_sha256`."""
        return dict(self.step.given_sha256)

    @property
    def walks(self) -> list[Walk]:
        """How the windows run through each block; the published procedure passes twice."""
        walks = super().walks
        return ["two_pass"] * len(walks) if self.recipe.extras.two_passes else walks

    def measuring_bytes(self) -> int:
        """Bytes of what is measured before the first block; 0 without a measurement."""
        return self.step.measuring_bytes(self)

    def disk_bytes(self, choice: Any = None) -> int:
        """Bytes of the result, with spilled hidden states and temporary files of the format."""
        return self.storage.copies * self.storage.file_bytes(choice) + self.memory.spilled_bytes

    def selected_linears(self) -> dict[str, Linear]:
        """The linears to prune, block by block: full name -> linear."""
        return self.storage.selection.linears(self.skeleton)

    @functools.cached_property
    def grid_bits(self) -> int | None:
        """The bits of the grid that most of the stored matrices lie on; None if most lie on none.

        Types are not needed for it; `SizePlan.lossless` names the grid that is one of a type.
        """
        if isinstance(self.source, ModuleSource):
            return None
        checkpoint, last = self.source.checkpoint, len(self.skeleton) - 1
        matrices = [
            key
            for index in {0, last // 2, last}
            for key in self.source.block_keys(index)
            if len(checkpoint.tensors[key].shape) > 1
        ]
        # A block of experts may have hundreds.
        samples = (
            next(checkpoint.pieces(x, _SAMPLE * checkpoint.tensors[x].dtype.itemsize))
            for x in matrices[:: 1 + len(matrices) // _SAMPLED]
        )
        return statistics.mode([value_bits(values) for values in samples] or [None])

    # The dense model next to the pruned one, and training towards it.

    @property
    def runs_dense_stream(self) -> bool:
        """Whether batches also run through the dense model: for dense targets, or for training."""
        return self.method.needs_drift or self.reconstruction is not None

    def uses_dense_target(self, in_features: int) -> bool:
        """Whether a linear with this many inputs also uses its inputs in the dense model."""
        if not self.method.needs_drift:
            return False
        return drift_is_worthwhile(in_features, self.tokens)

    @functools.cached_property
    def drift_stride(self) -> int:
        """One of this many batches also runs through the dense model.

        The training of all blocks needs every batch. Dense targets alone need enough tokens for
        the widest linear.
        """
        method = self.method
        trained = self.recipe.extras.reconstruct
        if trained == "all" or not method.needs_drift:
            return 1
        blocks = map(self.skeleton.linears, range(len(self.skeleton)))
        widths = (linear.shape[1] for linears in blocks for linear in linears)
        stride = drift_stride_for(
            self.tokens, max(filter(self.uses_dense_target, widths), default=1)
        )
        if trained == "none":
            return stride
        # Reconstruction needs two batches: one to train on and one for validation.
        return max(1, min(stride, self.batches - 1))

    @property
    def reconstruction(self) -> ReconstructionSettings | None:
        """How blocks are trained after they are pruned, or before; None where none is."""
        extras = self.recipe.extras
        if extras.reconstruct == "none":
            return None
        dtype = training_dtype(self.device, self.dtype)
        last_only = extras.reconstruct == "last"
        return ReconstructionSettings(extras.epochs, dtype, last_only, extras.before)

    def extra_bytes(self, index: int) -> int:
        """Bytes of what a run need not have while block `index` is pruned.

        These are dense targets, the statistics of two passes, and the copy that learns before it is
        changed.
        """
        inputs = [linear.shape[1] for linear in self.skeleton.linears(index)]
        # A dense target adds five float32 matrices like the Gram.
        extra = 5 * 4 * max(filter(self.uses_dense_target, inputs), default=0) ** 2
        if self.needs == "gram" and self.recipe.extras.two_passes:
            # The statistics of all linears of the block exist at the same time.
            extra += sum(statistics_bytes(width, self.needs) for width in inputs)
        if self.reconstruction is not None and self.reconstruction.before:
            parameters = self.skeleton.blocks[index].parameters()
            extra += sum(p.numel() for p in parameters) * self.dtype.itemsize
        return extra


@dataclass(frozen=True)
class ReconstructionSettings:
    """What a run says about the reconstruction of all its blocks.

    Attributes:
        epochs: Passes over the training batches; None for the block's `default_schedule`.
        dtype: Dtype of matrix products and activations, float32 or bfloat16.
        last_only: Only the last block is reconstructed.
        before: Weights are trained before they are changed: those after attention, when attention
            is changed already.
    """

    epochs: int | None
    dtype: torch.dtype
    last_only: bool = False
    before: bool = False

    def applies_to(self, index: int, blocks: int) -> bool:
        """Whether block `index` of a model with this many `blocks` is reconstructed."""
        return not self.last_only or index == blocks - 1


def training_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a training's matrix products: bfloat16 where that is native, else float32.

    In a run with 16 bits it is bfloat16 everywhere: activations and masks have 16 bits, which not
    all modules multiply by float32 weights, and gradients exceed the range of float16.
    """
    fast = device.type == "cuda" or native_bfloat16()
    return torch.bfloat16 if fast or dtype.itemsize == 2 else torch.float32


def select_linears(skeleton: Skeleton, recipe: LinearOptions, pattern: Pattern) -> LinearSelection:
    """Apply `only` and `ignore` of a recipe to the linears of a model.

    Raises:
        ValueError: A name pattern matches no linear, no linear is left, or the shape of a selected
            linear does not fit the pattern of zeros.
    """
    recipe.check_names(skeleton.all_linears())
    selection = LinearSelection([], {})
    for index in range(len(skeleton)):
        names = []
        for linear in skeleton.linears(index):
            full_name = f"{skeleton.block_name(index)}.{linear.name}"
            if recipe.selects(full_name):
                check_shape(pattern, linear.shape, full_name)
                names.append(linear.name)
            else:
                selection.left_dense[f"{full_name}.weight"] = linear.shape
        selection.selected.append(names)
        selection.left_dense.update(skeleton.left_dense(index))
    return selection


def plan_run(
    model: str | Path | nn.Module,
    recipe: LinearOptions,
    options: RunOptions,
    step: LinearStep,
    storage_of: Callable[[OpenModel, LinearSelection], Storage],
    fit: Fit | None = None,
    session: Session = SILENT,
    decided_dtype: str | None = None,
) -> LinearPlan:
    """Check all that needs neither weights nor text, and decide what the recipe leaves open.

    Args:
        model: A checkpoint folder, a hub id, or a loaded model.
        recipe: The options that decide the bytes of the result.
        options: The options that only decide how the work is done.
        step: How each linear is changed, as far as that is known without the model.
        storage_of: Plans how the result stores the linears.
        fit: Fits the step to the linears of the model; None if nothing depends on them.
        session: Who hears of a download.
        decided_dtype: What `dtype` auto meant in the run that is resumed; None for a new run.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, OSError: The run would fail; says what
            was given, what is wrong and what to do.
    """
    opened = open_model(model, options, session)
    step, storage = _changes_of(opened, recipe, step, storage_of, fit)
    plan = _decided_plan(opened, recipe, options, step, storage, decided_dtype)
    _check_order_of_windows(plan)
    plan = _with_memory(plan)
    _check_measurement(plan)
    return plan


def _changes_of(
    opened: OpenModel,
    recipe: LinearOptions,
    step: LinearStep,
    storage_of: Callable[[OpenModel, LinearSelection], Storage],
    fit: Fit | None,
) -> tuple[LinearStep, Storage]:
    """How the linears that the recipe selects are changed and stored; see `plan_run`."""
    pattern = step.work.pattern
    if recipe.extras.head:
        head = opened.skeleton.vocabulary_weights.prunable_head
        check_shape(pattern, head.shape, head.name)
    linears = select_linears(opened.skeleton, recipe, pattern)
    if fit is not None:
        step, linears = fit(step, opened.skeleton, linears)
    storage = storage_of(opened, linears)
    if isinstance(opened.source, CheckpointSource) and "the checkpoint" not in storage.unmatched:
        # Blocks for further tokens (MTP), which no model of transformers has, stay as they are.
        storage.selection.left_dense.update(opened.source.unused)
    return step, storage


def _decided_plan(
    opened: OpenModel,
    recipe: LinearOptions,
    options: RunOptions,
    step: LinearStep,
    storage: Storage,
    decided_dtype: str | None,
) -> LinearPlan:
    """The plan with statistics, dtype and batches, but not yet with memory; see `plan_run`."""
    method = step.method
    trains = "" if recipe.extras.reconstruct == "none" else "reconstruction"
    needs: Needs = "gram" if options.measure_error else method.needs
    walks = needs != "none" or trains != "" or recipe.measures == "inputs"
    window_tokens = opened.skeleton.window_shape(0, recipe.seqlen)[0]
    batch = 1 if step.work.reference_order else None  # the reference order sums window by window
    facts = run_facts(
        opened,
        recipe,
        options,
        needs=needs,
        needs_inputs=walks or recipe.measures == "loss" or storage.measures_loss,
        # Only a method that inverts the Gram matrix itself decides the dtype by it.
        adds_ridge=method.adds_ridge or method.needs != "gram",
        decided_dtype=decided_dtype,
    )
    return LinearPlan(
        **facts,
        walks_windows=walks,
        batch=windows_per_batch(recipe.samples, window_tokens, recipe.batch or batch, trains),
        storage=storage,
        step=step,
    )


def _check_order_of_windows(plan: LinearPlan) -> None:
    """Raise a ValueError if several processes cannot keep the original's order of operations."""
    if plan.processes > 1 and plan.recipe.extras.two_passes and plan.method.has_reference_order:
        raise ValueError(
            f"`propagate` block keeps the original's order of operations for {plan.method.name}, "
            f"window after window: {plan.processes} processes cannot share that. Leave it out, or "
            "run one process"
        )


def _check_measurement(plan: LinearPlan) -> None:
    """Raise a ValueError if the measurement before the first block does not fit in memory."""
    measured, held = plan.measuring_bytes(), process_memory()
    if plan.memory.budget < measured:
        raise ValueError(
            "measuring how the loss depends on each linear needs "
            f"{(measured + held) / 1e9:.2f} GB; the memory budget is "
            f"{(plan.memory.budget + held) / 1e9:.2f} GB. Raise `memory`"
            + (", or choose allocation uniform" if plan.step.rule != "uniform" else "")
        )


def _with_memory(plan: LinearPlan) -> LinearPlan:
    """The plan with what its blocks need, and how each is walked; see `with_memory`."""
    blocks = range(len(plan.skeleton))
    settings = plan.reconstruction
    trained = [
        index for index in blocks if settings and settings.applies_to(index, len(plan.skeleton))
    ]
    extra = [plan.extra_bytes(index) for index in blocks]
    return with_memory(plan, dense=plan.runs_dense_stream, trained=trained, extra=extra)
