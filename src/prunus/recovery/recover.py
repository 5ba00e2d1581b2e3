"""The story of one recovery: a pruned checkpoint and text in, a better one with the same zeros out.

pruned checkpoint ──► model ──► what is trained (the mode)
                                      │
text ──► windows ──────────────► training loop ◄── teacher (the dense model), if any
                                      │
                best weights ──► zeros checked weight by weight ──► result and record

Both models are read into memory before the training. A model that changes during the work ends it.
Tensors are stored in the dtype of the pruned checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from prunus.calibration.training_text import TrainingText
from prunus.distributed import fail_together, is_rank_0, on_rank_0, process_group
from prunus.engine.command import Command, Run, run_verb
from prunus.engine.folder import ResultFolder
from prunus.engine.progress import Shown, shows_progress
from prunus.engine.result import Result
from prunus.engine.run_options import RunOptions
from prunus.engine.run_record import (
    bos_words,
    extended_card,
    result_card,
    shard_name,
    source_name,
)
from prunus.engine.session import SILENT, Session
from prunus.model.adapter import save_adapter
from prunus.model.checkpoint.files import remove, write_text
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.open_folder import ADAPTER_CONFIG, OpenFolder
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.options import takes
from prunus.pruning.manifest import Manifest
from prunus.recovery.learner import ModelLearner
from prunus.recovery.recovery_options import Mode, RecoveryOptions
from prunus.recovery.recovery_plan import (
    RecoveryPlan,
    default_mode,
    plan_recovery,
    recovery_inputs,
)
from prunus.recovery.recovery_record import RecoveryInputs, RecoveryRecord
from prunus.recovery.student import base_name, load_student, load_teacher
from prunus.recovery.trainable import Trainable, check_zeros
from prunus.structure.structure_record import StructureRecord
from prunus.training.checkpoints import Checkpoints
from prunus.training.loop import Schedule, Step, Training

# Options of other runs. A whole model is trained, as transformers defines it.
_NOT_TAKEN = ("memory", "tokenizer", "trust_remote_code", "measure_error")


def _shown(step: Step) -> Shown:
    """What the progress bar shows after a step."""
    loss = "" if step.loss is None else f", loss {step.loss:.3f}"
    return Shown(min(step.fraction, 1.0), f"{step.tokens:,} tokens{loss}")


@shows_progress("recover", _shown)
@takes(RecoveryOptions, RunOptions, without=_NOT_TAKEN)
def recover(
    model: str | Path,
    output: str | Path,
    mode: str | None = None,
    *,
    teacher: str | Path | OpenFolder | None = None,
    progress: Callable[[Step], None] | bool | None = True,
    announce: Callable[[Any], None] | None = None,
    **options: Any,
) -> RecoveryRecord:
    """Win back quality of a pruned or smaller checkpoint by a short training.

    Under torchrun all processes make the same call, and split the windows of every step.

    Args:
        model: Folder or hub id of the checkpoint. It is not changed.
        output: Folder of the result: a checkpoint with the same zeros, or, in mode lora, a peft
            adapter.
        mode: lora, masked or full; see `RecoveryOptions`. None is masked for a pruned checkpoint,
            full for one that `prunus.shrink` made, and an error for all others.
        teacher: Folder or hub id of the dense model. The pruned model learns its logits in place of
            the text, or together with it (`distill_weight`).
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called after every step and evaluation with a `prunus.training.loop.Step`.
        announce: Called with what is being prepared before the first step.

    Returns:
        The record, which is also written to `prunus-recovery.json`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, ModuleNotFoundError,
        OSError: Before any work if possible. The message says what was given, what is wrong and
            what to do.
        ValueError: The loss was not finite. If an earlier evaluation was better than the start, its
            weights are the result in `output` nevertheless. Or a model was changed during the work.
        RuntimeError: A pruned weight would not be zero; no index is written.
    """
    session = Session(announce=announce, report=progress if callable(progress) else None)
    work, _ = RunOptions.pick(options)
    for name in _NOT_TAKEN:
        if work.get(name):
            raise ValueError(f"prunus recover has no option `{name}`; leave it out")
    how = RunOptions.read(None, work)
    with process_group(how.rank_timeout):
        with fail_together():
            command = Recovering.of(model, output, None, options | {"mode": mode}, teacher=teacher)
        return run_verb(command, session)


class RecoveryResult(Result[RecoveryRecord]):
    """A trained checkpoint, or an adapter."""

    def finish_earlier(self, folder: ResultFolder, plan: RecoveryPlan) -> None:
        """Check that a checkpoint is whole; a kill right after the end leaves the training."""
        if plan.recipe.mode != "lora":
            super().finish_earlier(folder, plan)
        Checkpoints(self.folder).clear()


@dataclass(frozen=True)
class Recovering(Command[RecoveryPlan, RecoveryRecord]):
    """The command recover, as the engine knows it.

    Attributes:
        teacher: Folder or hub id of the dense model, or None.
        opened: The folder of the model, if the mode was taken from it; else None.
    """

    RECIPE, KIND = RecoveryOptions, RecoveryRecord

    teacher: str | Path | OpenFolder | None = None
    opened: OpenFolder | None = None

    @classmethod
    def completed(
        cls, model: Any, recipe: Any, options: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """See `Command.completed`. A mode that is not given follows from the model."""
        if options.get("mode"):
            return options, {}
        opened = open_folder(model, unpacks=False)
        return {**options, "mode": default_mode(opened)}, {"opened": opened}

    @property
    def result(self) -> RecoveryResult | None:
        """The folder of the result, which lies apart from both models."""
        apart = () if self.teacher is None else (Path(str(self.teacher)),)
        return None if self.output is None else RecoveryResult(self.output, self.KIND, apart)

    def plan(self, session: Session = SILENT, decided_dtype: str | None = None) -> RecoveryPlan:
        """See `plan_recovery`. The dtype follows from the device, also in a resumed run."""
        return replace(
            plan_recovery(self.opened or self.model, self.recipe, self.options, self.teacher),
            name=self.model_name,
        )

    def inputs(self, plan: RecoveryPlan, session: Session) -> tuple[RecoveryInputs, TrainingText]:
        """See `recovery_inputs`."""
        session.tell(f"drawing training windows from {plan.recipe.text}")
        return recovery_inputs(plan)

    def fields(self, plan: RecoveryPlan) -> dict[str, Any]:
        """The name of the teacher."""
        return {"teacher": None if self.teacher is None else str(self.teacher)}

    def prepare(self, run: Run[RecoveryPlan, RecoveryRecord]) -> tuple[Trainable, int, Any]:
        """Load both models: most mistakes show before anything is written.

        Returns:
            The model to train, its number of parameters, and the teacher.
        """
        run.session.tell("loading what is trained, then measuring it before the training")
        with fail_together():
            student, size = load_student(run.plan)
            dense = load_teacher(run.plan)
            run.plan.check_unchanged()
        return student, size, dense

    def change_model(
        self, run: Run[RecoveryPlan, RecoveryRecord], prepared: tuple[Trainable, int, Any]
    ) -> None:
        """Train, and write the best weights.

        Raises:
            ValueError, RuntimeError: As `recover`.
        """
        student, size, dense = prepared
        plan, recipe, record = run.plan, run.plan.recipe, run.record
        output, folder = self.output, run.folder
        assert output is not None and folder is not None, "a model on disk is trained"
        if self.options.overwrite and is_rank_0():
            # No mixture of a checkpoint and an adapter may look whole.
            for name in ("config.json", ADAPTER_CONFIG):
                remove(output / name)
        checkpoints = Checkpoints(output)
        learner = ModelLearner(student, run.windows, recipe, plan.dtype, dense)
        schedule = Schedule(
            tokens=recipe.budget_tokens,
            minutes=recipe.minutes,
            step_tokens=recipe.batch * recipe.seqlen,
            rate=recipe.peak_rate(student.weight_rms),
            warmup=recipe.warmup,
            evaluations=recipe.evaluations,
            weight_decay=recipe.weight_decay,
        )
        training = Training(learner, schedule, checkpoints, run.session.step)
        state = training.run()
        best = state.evaluations[state.best]
        record.evaluations, record.best = state.evaluations, state.best
        record.stopped = state.stopped
        added = student.trained if recipe.mode == "lora" else 0
        record.totals = {
            "parameters": size,
            "trained_parameters": student.trained,
            "added_parameters": added,
            "added_share": added / size,
            "peak_learning_rate": schedule.rate,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 2),
            "held_out_perplexity_before": state.evaluations[0].perplexity,
            "held_out_perplexity_after": best.perplexity,
        }
        if state.stopped is not None and state.best == 0:
            raise ValueError(
                f"training stopped: {state.stopped}, and no evaluation before was better than "
                f"the start. {output} holds no result; lower `learning_rate` and `overwrite` it"
            )

        # All processes hold the same weights, so one of them writes.
        run.session.tell(f"writing {output}")

        def write() -> None:
            plan.check_unchanged()
            taken = run.totals()
            record.totals |= {"seconds_this_time": taken.pop("seconds"), **taken}
            write_result(run, folder, student)
            checkpoints.clear()

        on_rank_0(write)
        if state.stopped is not None:
            raise ValueError(
                f"training stopped: {state.stopped}. {output} holds the weights of step "
                f"{best.step}, the best until then; lower `learning_rate`"
            )


#: A function from tensors of the source to those of the result, both by their names in the model.
_Replaced = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
# Records of what was done to the source before. They hold for the result as well.
_LASTING_RECORDS = (Manifest.FILE, StructureRecord.FILE)


def write_result(
    run: Run[RecoveryPlan, RecoveryRecord], folder: ResultFolder, trainable: Trainable
) -> None:
    """Write the adapter, or the checkpoint with its zeros checked, and complete the record.

    Args:
        run: The recovery, whose record is completed.
        folder: The folder of the result.
        trainable: The trained model, with the best weights.

    Raises:
        RuntimeError: A pruned weight would not be zero. Its shard is not written, and no index.
    """
    plan, record, source = run.plan, run.record, run.plan.source
    if plan.recipe.mode == "lora":
        record.sha256 |= save_adapter(trainable.model, folder.folder)
        # The fields that the cards of peft have.
        fields = {"base_model": base_name(plan.name), "library_name": "peft"}
        card = result_card(
            record,
            "adapter",
            [_section(record)],
            tags=["lora", "pruned", "sparse"],
            relation="adapter",
            fields=fields,
            source=source.checkpoint.folder,
        )
        write_text(folder.folder / "README.md", card)
        record.state = "finished"
        folder.save()
        return
    # A tied head and embedding are one parameter with two names; both may be stored.
    changed = dict(trainable.model.named_parameters(remove_duplicate=False))

    def replaced(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors after the training, with every zero of the pruned linears checked."""
        written = {
            name: changed[name].detach().to("cpu", tensor.dtype) if name in changed else tensor
            for name, tensor in tensors.items()
        }
        for name, linear in trainable.pruned.items():
            key = f"{name}.weight"
            if key in written:
                record.linears[name] = check_zeros(name, linear.shape, tensors[key], written[key])
        return written

    _write_blocks(source, plan.skeleton, folder, replaced)
    weights = sum(linear.shape[0] * linear.shape[1] for linear in record.linears.values())
    zeros = sum(linear.zeros_after for linear in record.linears.values())
    sparsity = zeros / weights if weights else 0.0
    record.totals |= {"weights": weights, "zeros": zeros, "sparsity": sparsity}
    section = f"{_section(record)} Figures are in `{record.FILE}`."
    name = f"{source_name(record)}, recovered"
    card = extended_card(plan.card, "Recovery", section, name=name)
    folder.finish(record.sha256, card=card, keep_records=_LASTING_RECORDS)


def _write_blocks(
    source: CheckpointSource, skeleton: Skeleton, folder: ResultFolder, replaced: _Replaced
) -> None:
    """Write one shard per block, with experts one by one, and one for all outside the blocks."""
    count = source.shard_count
    for index in range(len(skeleton)):
        prefix = f"{skeleton.block_name(index)}."
        block = replaced({f"{prefix}{name}": x for name, x in source.block(index).items()})
        relative = {name.removeprefix(prefix): x for name, x in block.items()}
        folder.write_shard(shard_name(index, count), source.as_stored(index, relative))
    names = {key: name for name, key in source.stored_names.items()}
    outside = dict(source.checkpoint.read(source.outside_keys()))
    if outside:
        # The model has no name for some stored tensors.
        tensors = replaced({names.get(key, key): x for key, x in outside.items()})
        last = shard_name(count - 1, count)
        folder.write_shard(last, {key: tensors[names.get(key, key)] for key in outside})


# Words of the card: what a mode trains.
_TRAINED: dict[Mode, str] = {
    "lora": "low-rank layers added to its linears (LoRA)",
    "masked": "all its weights except the pruned ones",
    "full": "all its weights",
}
# Words of the card: what a mode leaves as it is.
_UNCHANGED: dict[Mode, str] = {
    "lora": "Every pruned weight is still zero",
    "masked": "Every pruned weight is still zero",
    "full": "Its shapes are those of the smaller model",
}


def _section(record: RecoveryRecord) -> str:
    """The section of the card about the recovery."""
    target = "the dense model" if record.teacher is not None else "the text alone"
    mode, inputs = record.recipe.mode, record.inputs
    return (
        f"Recovered by prunus. Trained: {_TRAINED[mode]}, on {inputs.text}, "
        f"{bos_words(inputs.bos)}, learning from {target}. {_UNCHANGED[mode]}."
    )
