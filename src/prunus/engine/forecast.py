"""How long a run of prune or compress takes, from a trial of its own pieces.

A count of operations says little: what one costs depends on shapes, types and the machine. So the
trial does what the run will do, with its real weights and on a few windows:

    measuring   two blocks, if the run begins by measuring how the loss depends on each linear
    embedding   what precedes the blocks, and the weights outside them
    a block     read, walked by a batch, changed; the last one too, if blocks are trained

What grows with windows, blocks or bytes is multiplied. Nothing of a trial is kept, no byte of the
result depends on it, and it takes about as long as one or two blocks of the run.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.calibration.sources import TextSource
from prunus.distributed import ranks
from prunus.engine.block.change_block import BlockChanger
from prunus.engine.block.dense_stream import DenseStream
from prunus.engine.block.linear import LinearRounding
from prunus.engine.calibration_windows import run_tokenizer, windows_source
from prunus.engine.linear_plan import LinearPlan, LinearSelection
from prunus.engine.linear_record import ReconstructionRecord
from prunus.engine.loop import read_block
from prunus.engine.reconstruction.reconstruct_block import default_schedule, split_batches
from prunus.engine.reconstruction.train import validations
from prunus.engine.session import SILENT
from prunus.hardware.machine import keep_freed_memory
from prunus.model.kinds import IMAGES
from prunus.model.source import ModuleSource

# The largest block that a plan tries, in bytes: more would take minutes.
_MOST_BYTES = 600 * 10**6


@dataclass(frozen=True)
class Trial:
    """What a command tries before its blocks.

    Attributes:
        seconds: What it takes in the run.
        round_as: How linears are rounded; None for a run that rounds none.
        after: From what changes blocks and its batches to the seconds of what follows the blocks.
    """

    seconds: float = 0.0
    round_as: LinearRounding | None = None
    after: Callable[[BlockChanger, list[Tensor]], float] = field(default=lambda *_: 0.0)


def forecast(plan: LinearPlan, trial: Callable[[LinearPlan, Tensor], Trial]) -> float | None:
    """Seconds that a run takes from reading the tokenizer to its end.

    Args:
        plan: The run.
        trial: Tries what the command does before its blocks.

    Returns:
        None if nothing is known: of runs on a GPU or of several processes, of images or a loaded
        model, that prune the head or pass twice, and where the trial fails.
    """
    recipe, extras = plan.recipe, plan.recipe.extras
    unknown = plan.device.type != "cpu" or ranks().size > 1 or isinstance(plan.source, ModuleSource)
    special = plan.skeleton.kind is IMAGES or recipe.measures == "inputs" or extras.head
    if unknown or special or extras.two_passes or max(plan.memory.stored_nbytes) > _MOST_BYTES:
        return None
    started = time.perf_counter()
    # What is wrong with weights, files or memory is found and said by the run itself.
    with contextlib.suppress(ValueError, OSError, MemoryError):
        if plan.keeps_freed_memory:
            keep_freed_memory()
        if plan.needs_inputs and isinstance(windows_source(recipe, plan.options), TextSource):
            run_tokenizer(plan)
        reading = time.perf_counter() - started
        windows = torch.randint(
            plan.skeleton.vocabulary_weights.rows,
            (3 * plan.batch, recipe.seqlen),
            generator=torch.Generator().manual_seed(0),
        )
        before = trial(plan, windows)
        return reading + before.seconds + _blocks(plan, windows, before)
    return None


def two_blocks(plan: LinearPlan) -> LinearPlan:
    """The plan for a model that ends after its second block."""
    skeleton = copy.copy(plan.skeleton)
    skeleton.blocks = skeleton.blocks[:2]
    selection = LinearSelection(plan.selected[:2], plan.left_dense)
    return replace(plan, skeleton=skeleton, storage=replace(plan.storage, selection=selection))


def _blocks(plan: LinearPlan, windows: Tensor, before: Trial) -> float:
    """Seconds from the hashes of what is outside the blocks to the end."""
    reconstruction, last = plan.reconstruction, len(plan.skeleton) - 1
    # Training needs a batch to train on, and one to check it.
    count = plan.walks_windows * (2 if reconstruction else 1)
    batches = list(windows.split(plan.batch)[:count])
    changer = BlockChanger(plan, SILENT, plan.walks, plan.sparsities, before.round_as)
    models, all_batches = 1, plan.batches
    if changer.dense is not None:
        # A run of few batches needs them all in both models to train.
        changer.dense = DenseStream(plan.skeleton, plan.source, plan.device)
        models, all_batches = 2, plan.batches + -(-plan.batches // plan.drift_stride)
    stored, of_kind = plan.memory.stored_nbytes, dict[int, float]()
    with torch.no_grad(), contextlib.closing(changer):
        started = time.perf_counter()
        changer.embed(batches, Path(tempfile.gettempdir()))
        seconds = time.perf_counter() - started
        for index in {min(1, last)} | ({last} if reconstruction else set()):
            started = time.perf_counter()
            block = read_block(plan, index, {})
            read = (time.perf_counter() - started) / stored[index]
            record: Any = changer.change_block(index, block).record
            method = sum(linear.seconds for linear in record.linears.values())
            trained, walked = 0.0, record.seconds - method
            if record.reconstruction is not None:
                walked -= record.reconstruction.seconds
                trained = _training(plan, index, record.reconstruction, len(batches))
            if batches:
                walked *= all_batches / (models * len(batches))
            of_kind[index] = method + trained + walked
        seconds += before.after(changer, batches)
    others = sum(stored) - (stored[last] if reconstruction else 0)
    first, *of_last = of_kind.values()
    seconds += first * others / stored[min(1, last)] + sum(of_last)
    written = plan.storage.copies * plan.storage.file_bytes()
    return seconds + read * (sum(stored) + written + plan.memory.outside)


def _training(plan: LinearPlan, index: int, record: ReconstructionRecord, batches: int) -> float:
    """Seconds of the training of a block in the run, whose trial trained on `batches` batches."""
    tokens, hidden = plan.skeleton.window_shape(index, plan.recipe.seqlen)
    by_logits, given = record.measure == "logits", plan.recipe.extras.epochs

    def epochs(by_token: bool, count: int) -> int:
        chosen = default_schedule(plan.batch * tokens, hidden, by_token, count, by_logits)
        return given or chosen.epochs

    train, checked = split_batches(-(-plan.batches // plan.drift_stride))
    tried, once = split_batches(batches)
    tried_epochs = record.steps // len(tried)
    # The trial shows whether the trained part takes tokens apart, which decides the epochs.
    all_epochs = epochs(epochs(True, batches) == tried_epochs, len(train) + len(checked))
    more_steps = all_epochs * len(train) - record.steps
    more_checks = validations(all_epochs) * len(checked) - validations(tried_epochs) * len(once)
    of_check = record.validation_seconds / len(once)
    return record.seconds + more_steps * record.step_seconds + more_checks * of_check
