"""The story of one run, told once, for every command that writes a model.

    read ► hold ► earlier run? ► plan ► room ► RESUME OR START ► close
                                                │
            inputs ► record ► finished? ► prepare ► begin ► CHANGE MODEL

`Command.of` reads what a caller gives: a function of Python, the command line, `plan` or a sweep.
`run_verb` tells the first line from top to bottom, and `_resume_or_start` the second, whose record
lets a killed run continue. A command says what its plan is and how it changes the model:
`linear_command.py` has what prune and compress share, `structure/shrink.py` shrink, and
`recovery/recover.py` recover. An import is made anew, so it only changes the model. If torchrun
started several processes, all do the same work, each on its share of the windows, and rank 0
writes.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch import nn

from prunus.distributed import fail_together, on_rank_0, process_group, ranks
from prunus.engine.calibration_windows import calibration_windows, given_windows, run_inputs
from prunus.engine.folder import ResultFolder, held, resumed_or_new
from prunus.engine.result import Result
from prunus.engine.run_facts import check_room, check_same_on_all_ranks
from prunus.engine.run_options import RunOptions
from prunus.engine.run_record import OtherRunError, RunInputs
from prunus.engine.session import SILENT, Session
from prunus.hardware.machine import keep_freed_memory, peak_memory, return_freed_memory
from prunus.options import Options

_Plan = TypeVar("_Plan", bound=Any)
_Record = TypeVar("_Record", bound=Any)


@dataclass(frozen=True)
class Run(Generic[_Plan, _Record]):
    """A run after all checks, while no other run can use the result.

    Attributes:
        plan: Its plan.
        session: Who hears of the steps.
        windows: What it reads of a text: calibration windows (windows, tokens), images, or the
            windows of a training.
        record: Its record, with the blocks that an earlier run has finished.
        started: When it began, on the clock of `time.perf_counter`.
        folder: The folder of the result; None for a loaded model.
    """

    plan: _Plan
    session: Session
    windows: Any
    record: _Record
    started: float
    folder: ResultFolder | None

    @property
    def spill_folder(self) -> Path:
        """Where hidden states are kept that do not fit in memory."""
        return Path(tempfile.gettempdir()) if self.folder is None else self.folder.folder

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
    """What a command says to `run_verb`.

    Its plan is an `OpenModel` with decisions, its record a `RunRecord`; those of an import are
    simpler.

    Attributes:
        RECIPE: The class of its recipe.
        KIND: The class of its record.
        RESULT: The class of its result.
        RESUMES: Whether a killed run continues by its record; else it is made anew.
        model: A checkpoint folder, a hub id, or a loaded model.
        output: The result as the user names it; None changes a loaded model in place, and leaves
            the checks of the output out of a plan.
        recipe: The options that decide the bytes of the result.
        options: The options that only decide how the work is done.
    """

    RECIPE: ClassVar[type[Options]]
    KIND: ClassVar[type[Any]]
    RESULT: ClassVar[type[Result[Any]]] = Result
    RESUMES: ClassVar[bool] = True

    model: Any
    output: Path | None
    recipe: Any
    options: RunOptions

    @classmethod
    def of(
        cls,
        model: Any,
        output: str | Path | None,
        recipe: Any,
        options: Mapping[str, Any],
        calibration: Any = None,
        **fields: Any,
    ) -> Self:
        """The command that a caller asks for.

        Args:
            model: The model.
            output: The result; None changes a loaded model.
            recipe: A recipe, or a TOML file with any of its options; None for the defaults.
            options: Options of the recipe and of the run, by name. None leaves an option as it is.
            calibration: Where the windows come from; see `given_windows`. None leaves it to the
                recipe.
            **fields: Further fields of the command, such as the teacher of recover.

        Raises:
            ValueError, FileNotFoundError: An option is unknown or out of range, or options do not
                fit together, or the file cannot be read.
        """
        options, found = cls.completed(model, recipe, options)
        work, given = RunOptions.pick(options)
        data, described = ({}, {}) if calibration is None else given_windows(calibration)
        chosen = cls.RECIPE.read(recipe, given | described)
        out = None if output is None else Path(output)
        how = RunOptions.read(None, {**work, **data})
        return cls(model, out, chosen, how, **fields, **found)

    @classmethod
    def completed(
        cls, model: Any, recipe: Any, options: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """The options of a caller with those that follow from the model or from the processes.

        The arguments are those of `of`.

        Returns:
            The options, and the fields of the command that were found on the way.
        """
        return options, {}

    @property
    def result(self) -> Result[Any] | None:
        """Where the result is written; None for nowhere."""
        return None if self.output is None else self.RESULT(self.output, self.KIND)

    @property
    def model_name(self) -> str:
        """The model as the user named it; the class name of a loaded model, as in a plan."""
        return type(self.model).__name__ if isinstance(self.model, nn.Module) else str(self.model)

    @abstractmethod
    def plan(self, session: Session = SILENT, decided_dtype: str | None = None) -> _Plan:
        """Check all that needs neither weights nor text, and decide what the recipe leaves open.

        The plan has `disk_bytes()`, the bytes that the run needs on the disk, and `describe()`, the
        plan as JSON values.

        Args:
            session: Who hears of the checks.
            decided_dtype: What `dtype` auto meant in the run that is resumed; None for a new run.
        """

    def forecast(self, plan: _Plan) -> float | None:
        """Seconds that the work takes, without its plan; None if that is unknown."""
        return None

    def inputs(self, plan: _Plan, session: Session) -> tuple[RunInputs, Any]:
        """Read the text of a run: what decides the result beside the recipe, and `Run.windows`.

        Here these are calibration windows, which run through the model block by block.
        """
        if plan.keeps_freed_memory:
            keep_freed_memory()
        if plan.needs_inputs:
            session.tell(f"drawing calibration windows from {plan.recipe.calibration}")
        windows = calibration_windows(plan)
        return run_inputs(plan, windows), windows.ids

    def fields(self, plan: _Plan) -> dict[str, Any]:
        """The fields of a new record beside its source, its recipe and its inputs."""
        return {}

    def prepare(self, run: Run[_Plan, _Record]) -> Any:
        """Do what can fail before anything is written, and return what `change_model` needs."""

    @abstractmethod
    def change_model(self, run: Run[_Plan, _Record], prepared: Any) -> None:
        """Change the model, and complete the result.

        Args:
            run: The run.
            prepared: What `prepare` returned.
        """


def run_verb(
    command: Command[_Plan, _Record],
    session: Session = SILENT,
    *,
    plan_only: bool = False,
    after: Callable[[_Record, Session, _Plan | None], None] | None = None,
) -> Any:
    """Carry out a command, and return the record of the run; or make its plan, and return that.

    Args:
        command: What is done.
        session: Who hears of the progress. All processes that torchrun started join it.
        plan_only: Whether to end with the plan; nothing is written. Without a result its checks are
            left out. The errors are those of the run.
        after: Called on all processes with the record of the finished result, which it may extend,
            before any other run may change the result; None for nothing. It also gets the plan,
            which is None if the result of an earlier run stands.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: Before any
            work where possible; says what was given, what is wrong and what to do.
        RankError: Under torchrun, another process was lost or failed; names it.
    """
    options, result, earlier, plan = command.options, command.result, None, None

    def find() -> Any:
        assert result is not None
        return result.earlier(command.model_name, command.recipe, options)

    with contextlib.ExitStack() as stack:
        if not plan_only:
            stack.enter_context(process_group(options.rank_timeout))
        if result is not None:
            result.check(command.model_name)
            try:
                if plan_only:
                    find()
                else:
                    # What the folder holds decides what is done: no other run changes it any more.
                    earlier = stack.enter_context(held(command.KIND, result.folder, find))
            except FileExistsError as fault:
                # What is wrong with the options comes first, and what is in the folder after that.
                # No model is downloaded for it. Other ranks would not join: they hear of an error.
                is_here = isinstance(fault, OtherRunError) or Path(command.model_name).exists()
                if is_here and ranks().size == 1:
                    command.plan(session)
                raise
        record: Any = earlier
        if result is None or earlier is None or not result.is_complete(earlier):
            started = time.perf_counter()
            session.tell(
                f"reading the configuration of {command.model_name}, and checking what is to do"
            )
            with fail_together():
                # A resumed run keeps its dtype: the trial behind "auto" need not be repeated.
                inputs: Any = getattr(earlier, "inputs", None)
                plan = command.plan(session, inputs and inputs.dtype)
            if result is not None:
                on_rank_0(lambda: check_room(plan.disk_bytes(), result.folder))
            if plan_only:
                return plan
            record = _resume_or_start(command, plan, session, earlier, started)
            if result is not None:
                # Rank 0 has written, so the others take its record.
                dumped = on_rank_0(lambda: record.model_dump(mode="json"))
                record = command.KIND.model_validate(dumped)
        if result is not None:
            if after is not None:
                after(record, session, plan)
            on_rank_0(result.close)
        return record


def _resume_or_start(
    command: Command[_Plan, _Record],
    plan: _Plan,
    session: Session,
    earlier: _Record | None,
    started: float,
) -> _Record:
    """Go on with the earlier run, or start one, while no other run can use the result.

    Args:
        command: What is done.
        plan: The plan of the run.
        session: Who hears of the steps.
        earlier: The record of the run to go on with, or of a finished one; None for a new run.
        started: When the run began, on the clock of `time.perf_counter`.
    """
    if not command.RESUMES:
        run = Run(plan, session, None, command.KIND({}), started, None)
        command.change_model(run, None)
        return run.record
    result, folder = command.result, None
    fields = {"source": plan.name, **command.fields(plan)}
    with fail_together():
        inputs, windows = command.inputs(plan, session)
        place = None if result is None else result.folder
        record: _Record = resumed_or_new(
            command.KIND, earlier, place, command.recipe, inputs, plan.device, **fields
        )
    check_same_on_all_ranks(record)
    if result is not None:
        folder = ResultFolder(result.folder, record, plan.checkpoint)
        if record.state == "finished":
            on_rank_0(lambda: result.finish_earlier(folder, plan))
            return record
    run = Run(plan, session, windows, record, started, folder)
    prepared = command.prepare(run)
    if folder is not None:
        record.forget_missing({*on_rank_0(lambda: folder.begin(command.options.overwrite))})
    command.change_model(run, prepared)
    # Only now: the embedding and the head, rounded after the last block, use the pages again.
    return_freed_memory()
    return record
