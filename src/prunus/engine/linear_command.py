"""The step of prune and compress: the linears of each block are pruned or rounded.

for each block:  load weights ► walk the windows ► prune ► reconstruct ► write ► release

head, if the recipe prunes it ──► pruned checkpoint + record
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from threading import RLock
from typing import Any, TypeVar

import torch

from prunus.calibration.corpora import LOCAL_SOURCES, data_folder
from prunus.engine.block.change_block import BlockChanger
from prunus.engine.command import Command, Run
from prunus.engine.forecast import Trial, forecast
from prunus.engine.linear_plan import (
    LinearPlan,
    LinearSelection,
    LinearStep,
    Storage,
    plan_run,
)
from prunus.engine.linear_record import LinearsRecord
from prunus.engine.loop import run_blocks
from prunus.engine.output import InPlaceOutput, Rounding, ShardFolder
from prunus.engine.run_facts import agreed_walks
from prunus.engine.session import SILENT, Session
from prunus.kernels.library import missing_words
from prunus.model.skeleton import Skeleton
from prunus.model.source import ModuleSource, OpenModel
from prunus.words import about, counted

# From this number of batches on, as the windows of prune have, a run says how long it takes. The
# trial takes 0.6 to 1.7 % of such a run, and up to a fifth of a run of 2 batches.
_MANY_BATCHES = 64
# Held by the run that computes on one processor thread.
_ONE_THREAD = RLock()
_Record = TypeVar("_Record", bound=LinearsRecord)


@dataclass(frozen=True)
class LinearCommand(Command[LinearPlan, _Record]):
    """A command that changes the linears of a model; see `Command`."""

    @abstractmethod
    def step(self) -> LinearStep:
        """How each linear is changed, as far as it is known without the model."""

    def fit(
        self, step: LinearStep, skeleton: Skeleton, linears: LinearSelection
    ) -> tuple[LinearStep, LinearSelection]:
        """Fit the step to the linears that a model has and the recipe selects."""
        return step, linears

    @abstractmethod
    def storage(self, opened: OpenModel, selection: LinearSelection) -> Storage:
        """How the result stores the linears that the recipe selects."""

    def rounding(self, run: Run[LinearPlan, _Record]) -> Rounding | None:
        """Choose how linears are rounded, before the first block; None for a run that rounds none.

        A run that rounds has a folder, which keeps its measurements.
        """
        return None

    def plan(self, session: Session = SILENT, decided_dtype: str | None = None) -> LinearPlan:
        """See `plan_run`."""
        recipe, options, step = self.recipe, self.options, self.step()
        plan = plan_run(
            self.model, recipe, options, step, self.storage, self.fit, session, decided_dtype
        )
        if plan.device.type == "cpu" and plan.needs == "gram" and (words := missing_words()):
            session.tell(words)
        return plan

    def forecast(self, plan: LinearPlan) -> float | None:
        """See `forecast`."""
        return forecast(plan, self.trial)

    def trial(self, plan: LinearPlan, windows: torch.Tensor) -> Trial:
        """What is tried of the steps before the blocks; see `forecast`."""
        return Trial()

    def fields(self, plan: LinearPlan) -> dict[str, Any]:
        """What a record of linears has beside its recipe and its inputs."""
        # The folder of local datasets that the calibration text was read from, if any.
        is_local = plan.needs_inputs and plan.recipe.calibration in LOCAL_SOURCES
        data = data_folder(self.options.data) if is_local else None
        return {
            "data_dir": None if data is None else str(data.absolute()),
            "method_name": plan.method.name,
            "left_dense": plan.left_dense,
            "grid_bits": plan.grid_bits,
            "shard_count": 0 if isinstance(plan.source, ModuleSource) else plan.source.shard_count,
        }

    def prepare(self, run: Run[LinearPlan, _Record]) -> str:
        """Decide the sparsity of every linear; a resumed run takes it from its record.

        A long run says first how long it takes, unless it is resumed.

        Returns:
            These words, which stay on a terminal while the first block is changed; or nothing.
        """
        record, words = run.record, ""
        if (
            run.session.announce is not None
            and not record.blocks
            and run.plan.walks_windows * run.plan.batches >= _MANY_BATCHES
        ):
            run.session.tell("trying pieces of the run, to say how long it takes")
            if (seconds := self.forecast(run.plan)) is not None:
                words = f"; the run takes {about(seconds)}"
                run.session.tell(f"tried pieces of the run{words}")
        allocate = run.plan.step.allocate
        if not record.allocation and allocate is None:
            record.allocation = dict(run.plan.sparsities)
        elif not record.allocation and allocate is not None:
            record.allocation = allocate(
                run.plan, run.session, run.windows, record.measured, run.spill_folder
            )
        return words

    def change_model(self, run: Run[LinearPlan, _Record], prepared: Any) -> None:
        """Change all linears block by block, and complete the result."""
        plan, session, record, recipe = run.plan, run.session, run.record, run.plan.recipe
        rounding = self.rounding(run)
        output: InPlaceOutput | ShardFolder
        if self.result is None:
            assert isinstance(plan.source, ModuleSource), "a checkpoint is pruned into a folder"
            output = InPlaceOutput(plan.source, record, plan.storage)
        else:
            output = ShardFolder(record, plan, self.result, rounding)
            output.write_known()
        walks = agreed_walks(plan.walks)
        round_as = None if rounding is None else rounding.of
        changer = BlockChanger(plan, session, walks, record.allocation, round_as)
        in_order = plan.work.reference_order
        threads = _one_processor_thread() if in_order else contextlib.nullcontext()
        with torch.no_grad(), contextlib.closing(changer), threads:
            # Everything before the first block: windows become hidden states.
            batches = run.windows.split(plan.batch) if plan.walks_windows else ()
            embedding = f"embedding {counted(len(run.windows), 'window')} and " if batches else ""
            session.tell(f"{embedding}reading block 0{prepared}")
            changer.embed(batches, run.spill_folder)
            # In the reference order the next block depends on weights before they were rounded for
            # storage, so a finished block is pruned once more.
            run_blocks(plan, session, changer, output, record.measured, again=in_order)
            place = "" if self.result is None else f", and completing {self.output}"
            session.tell(f"working on what lies outside the blocks{place}")
            pruned_head: dict[str, torch.Tensor] = {}
            if recipe.extras.head:
                pruned_head, record.head = changer.prune_head(batches)
            needs_head = rounding is not None and rounding.needs_head
            head = changer.head_statistics(batches) if needs_head else None
        record.totals = record.summary() | run.totals()
        output.complete(pruned_head, head)


@contextlib.contextmanager
def _one_processor_thread() -> Iterator[None]:
    """Compute on one processor thread while the `with` lasts, one run after the other.

    torch has one number of threads for the whole process, and one for each thread of Python. If two
    runs changed it at the same time, neither could put back what was there before.
    """
    with _ONE_THREAD:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
