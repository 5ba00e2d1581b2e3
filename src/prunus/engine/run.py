"""The story of one run, for every command that changes a model block by block.

    hold ► earlier run? ► plan ► room ► windows ► record ► begin ► BLOCKS ► finish ► close

`carry_out` tells this story from top to bottom. A `Command` says what its plan is and what happens
to the blocks: `linear_run.py` has that of prune and compress, `structure/shrink.py` that of shrink.
If torchrun started several processes, each runs its share of the windows through the whole model,
all change every block equally, and rank 0 writes.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from prunus.engine.folder import ResultFolder, held, resumed_or_new
from prunus.engine.open_model import check_room, check_same_on_all_ranks
from prunus.engine.result import Result
from prunus.engine.run_options import RunOptions
from prunus.engine.run_plan import RunPlan
from prunus.engine.run_record import BlockwiseRecord, Walk
from prunus.engine.run_windows import calibration_windows, run_inputs
from prunus.engine.session import SILENT, Session
from prunus.hardware.memory import keep_freed_memory, peak_memory

_Record = TypeVar("_Record", bound=BlockwiseRecord)
_Plan = TypeVar("_Plan", bound=RunPlan)


@dataclass(frozen=True)
class Run(Generic[_Plan, _Record]):
    """A run after all checks, while no other run can use the result.

    Attributes:
        plan: Its plan.
        session: Its processes, and who hears of the steps.
        ids: The calibration windows (windows, tokens), or images.
        walks: Per block of the source, how the windows go through it.
        record: Its record, with the blocks that an earlier run has finished.
        started: When it began, on the clock of `time.perf_counter`.
    """

    plan: _Plan
    session: Session
    ids: torch.Tensor
    walks: list[Walk]
    record: _Record
    started: float

    def totals(self) -> dict[str, Any]:
        """What the run has taken until now, for the record."""
        totals = {
            "seconds": round(time.perf_counter() - self.started, 2),
            "peak_memory_bytes": peak_memory(),
        }
        if self.plan.device.type == "cuda":
            totals["peak_device_memory_bytes"] = peak_memory(self.plan.device)
        return totals


@dataclass(frozen=True)
class Command(ABC, Generic[_Plan, _Record]):
    """What a command says to `carry_out`.

    Attributes:
        KIND: The class of its record.
        model: A checkpoint folder, a hub id, or a loaded model.
        output: The result as the user names it; None changes a loaded model in place, and leaves
            the checks of the output out of a plan.
        recipe: The options that decide the bytes of the result.
        options: The options that only decide how the work is done.
    """

    KIND: ClassVar[type[Any]]

    model: Any
    output: Path | None
    recipe: Any
    options: RunOptions

    @property
    def result(self) -> Result[_Record] | None:
        """Where the result is written; None for nowhere."""
        return None if self.output is None else Result(self.output, self.KIND)

    @abstractmethod
    def plan(self, session: Session = SILENT, decided_dtype: str | None = None) -> _Plan:
        """Check all that needs neither weights nor text, and decide what the recipe leaves open.

        Args:
            session: The processes that work on the run.
            decided_dtype: What `dtype` auto meant in the run that is resumed; None for a new run.
        """

    @abstractmethod
    def fields(self, plan: _Plan) -> dict[str, Any]:
        """The fields of a new record beside its recipe and its inputs."""

    def prepare(self, run: Run[_Plan, _Record]) -> None:
        """Measure what can fail before anything is written."""

    @abstractmethod
    def change(self, run: Run[_Plan, _Record]) -> None:
        """Change all blocks, and complete the result."""


def carry_out(
    command: Command[_Plan, _Record],
    session: Session,
    after: Callable[[_Record, Session], None] | None = None,
) -> _Record:
    """Carry out a command, and return the record of the run.

    Args:
        command: What is done.
        session: Who hears of the progress. All processes that torchrun started join it.
        after: Called on all processes with the record of the finished result, which it may extend,
            before any other run may change the result; None for nothing.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: Before any
            work where possible; says what was given, what is wrong and what to do.
        RankError: Under torchrun, another process was lost or failed; names it.
    """
    options, result = command.options, command.result
    with session.joined(options.rank_timeout) as joint:
        ranks = joint.ranks
        if result is None:
            return _carry_out_held(command, joint, None)
        model = str(command.model)
        result.check(model)

        def find() -> _Record | None:
            return result.earlier(model, command.recipe, options)

        # What the folder holds decides what is done: from here on no other run may change it.
        with held(command.KIND, result.folder, ranks, find) as earlier:
            if earlier is not None and result.is_complete(earlier):
                record = earlier
            else:
                record = _carry_out_held(command, joint, earlier)
            if after is not None:
                after(record, joint)

            def close() -> dict[str, Any]:
                result.close()
                return record.model_dump(mode="json")

            done: _Record = command.KIND.model_validate(ranks.on_rank_0(close))
            return done


def _carry_out_held(
    command: Command[_Plan, _Record], session: Session, earlier: _Record | None
) -> _Record:
    """Carry out a command whose result this run holds, and go on with an `earlier` run."""
    started, ranks, result = time.perf_counter(), session.ranks, command.result
    with ranks.fail_together():
        # A resumed run keeps its dtype: the trial behind "auto" need not be repeated.
        decided_dtype = earlier.inputs.dtype if earlier is not None else None
        plan = command.plan(session, decided_dtype)
    if plan.keeps_freed_memory:
        keep_freed_memory()
    if result is not None:
        ranks.on_rank_0(lambda: check_room(plan.disk_bytes(), result.folder))
    fields = {"source": plan.model_name, **command.fields(plan)}
    if plan.needs_inputs:
        session.tell(f"drawing calibration windows from {plan.recipe.calibration}")
    with ranks.fail_together():
        windows = calibration_windows(plan)
        inputs = run_inputs(plan, ranks, windows)
        record: _Record = resumed_or_new(
            command.KIND, earlier, plan.recipe, inputs, plan.device, **fields
        )
    walks = check_same_on_all_ranks(command.recipe, record, ranks, plan.walks)
    run = Run(plan, session, windows.ids, walks, record, started)
    if result is not None:
        folder = ResultFolder(result.folder, record, plan.checkpoint.checkpoint, ranks)
        if record.state == "finished":
            ranks.on_rank_0(lambda: result.check_finished(folder, plan))
            return record
    command.prepare(run)
    if result is not None:

        def begin() -> int:
            folder.begin(command.options.overwrite)
            return len(record.blocks)

        del record.blocks[ranks.on_rank_0(begin) :]
    command.change(run)
    return record


def planned(command: Command[_Plan, _Record]) -> _Plan:
    """The plan that `carry_out` would carry out; nothing is written.

    Without a result, the checks of it are left out. The errors are those of `carry_out`.
    """
    result = command.result
    if result is None:
        return command.plan()
    result.check(command.model)
    result.earlier(command.model, command.recipe, command.options)
    plan = command.plan()
    check_room(plan.disk_bytes(), result.folder)
    return plan
