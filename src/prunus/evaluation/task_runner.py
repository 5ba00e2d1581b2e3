"""Models on tasks, zero-shot or few-shot: checked, and scored.

Every check that needs no weights runs before any weights are read. Each task is scored by itself.
Its score therefore does not depend on the other tasks of the call.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from pydantic import TypeAdapter
from torch import nn

from prunus.calibration.corpora import data_folder
from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.evaluation.model_input import ModelInput, check_as_loaded, find_model
from prunus.evaluation.options import TaskOptions
from prunus.evaluation.streamed_model import ComputeOptions
from prunus.evaluation.task_scores import TaskResults, TaskScore
from prunus.evaluation.tasks import LoadedTask, load_tasks, require_lm_eval, run_task, wrap_model
from prunus.evaluation.watched import unchanged
from prunus.hardware.memory import describe_hardware, processor_name, versions
from prunus.model.device import choose_device
from prunus.options import takes
from prunus.runs.progress import Shown, shows_progress

#: Sequences at once for batch "auto" on a CPU, where no device memory limits the batch.
_CPU_BATCH = 8


@takes(TaskOptions)
@shows_progress("evaluate", lambda line: Shown(None, line))
def evaluate(
    model_or_path: Any,
    tasks: str | Sequence[str] = "paper7",
    *,
    progress: Callable[[str], None] | bool | None = True,
    **options: Any,
) -> TaskResults:
    """Accuracy of a causal language model on tasks of lm-eval.

    Args:
        model_or_path: a folder (dense, packed, or an adapter), a hub id, or a loaded transformers
            model. A loaded model is evaluated on its device and in its dtype, with the tokenizer of
            its `name_or_path`.
        tasks: a list of names, or one string with commas. Names are tasks, tags and groups of
            lm-eval, or `paper7` for the Wanda paper's boolq, rte, hellaswag, winogrande, arc_easy,
            arc_challenge and openbookqa.
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called with a line of text after every task.
        **options: see `TaskOptions`. The folder `data` contains the rows in `zeroshot/`.

    Raises:
        ModuleNotFoundError: lm-eval is not installed, or an adapter is given and peft is not; names
            the extra.
        ValueError: an argument is out of range, a task is unknown, a tokenizer or an adapter does
            not fit, a model cannot be loaded or is changed during the work, or outputs are not
            finite.
        FileNotFoundError: no such model, or the data folder lacks files (the message names them).
        OSError: the hub does not answer.
    """
    run = prepare_tasks([model_or_path], tasks, **options)
    return run.run(progress if callable(progress) else None)[0]


@dataclass(frozen=True)
class TaskRun:
    """Models and tasks that were checked together. `prepare_tasks` creates it.

    Attributes:
        models: the models to evaluate, each with its tokenizer.
        tasks: the tasks, with their rows.
        batch: sequences in one forward pass, or "auto".
        options: how the models are computed.
    """

    models: tuple[tuple[ModelInput, Any], ...]
    tasks: tuple[LoadedTask, ...]
    batch: int | str
    options: ComputeOptions

    def run(
        self, progress: Callable[[str], None] | None = None, ranks: Ranks = SINGLE_PROCESS
    ) -> list[TaskResults]:
        """Evaluate one model after the other. Ranks split the rows, each with the whole model.

        On rank 0, `progress` is called with a line of text after every task.
        """
        choose_device(str(self.options.device), processes=ranks.local_size)
        report = progress if progress is not None and ranks.rank == 0 else lambda _: None
        return [self._evaluate(*each, report, ranks) for each in self.models]

    def _evaluate(
        self, model: ModelInput, tokenizer: Any, report: Callable[[str], None], ranks: Ranks
    ) -> TaskResults:
        scores: list[TaskScore] = []
        ranks.set_location(f"loading {model.name}")
        with unchanged([model.watch()], ranks):
            with ranks.fail_together():
                folder = model.folder
                loaded = model.loaded if folder is None else self.options.load(folder)
                wrapped = wrap_model(loaded, tokenizer, self.batch, ranks)
            for task in self.tasks:
                ranks.set_location(f"{task.name} of {model.name}")
                found = _score(task, wrapped, ranks)
                report(f"{model.name}: {task.name} done in {found[0].seconds:.0f} s")
                scores += found
        del wrapped, loaded
        # Free this model's memory before the next one is loaded.
        gc.collect()
        return TaskResults(model.name, tuple(scores), self._protocol(model))

    def _protocol(self, model: ModelInput) -> dict[str, Any]:
        """How the model is evaluated: processor, device, dtype, batch and versions."""
        loaded, device = model.loaded, self.options.device
        numbers = versions()
        dtype = self.options.dtype if loaded is None else str(loaded.dtype)
        return {
            "processor": processor_name(),
            "device": describe_hardware(device)["device"],
            "versions": {name: numbers[name] for name in ("prunus", "torch", "transformers")}
            | {"lm_eval": version("lm_eval")},
            "dtype": dtype.removeprefix("torch."),
            "batch": self.batch,
        }


def _score(task: LoadedTask, wrapped: Any, ranks: Ranks) -> list[TaskScore]:
    """Score one task on all ranks. lm-eval returns the scores on rank 0, which sends them."""
    on_rank_0 = run_task(task, wrapped)
    sent = ranks.on_rank_0(lambda: [asdict(score) for score in on_rank_0 or []])
    return on_rank_0 or TypeAdapter(list[TaskScore]).validate_python(sent)


def prepare_tasks(
    models: Sequence[Any], tasks: str | Sequence[str] = "paper7", **options: Any
) -> TaskRun:
    """Check models and tasks before any work, so that all models are evaluated on the same rows.

    See `evaluate` for arguments and errors. Call `run` on the result.
    """
    require_lm_eval()
    given = TaskOptions.read(None, options)
    for model in models:
        check_as_loaded(model, given.dtype, given.device)
    loaded = next((model for model in models if isinstance(model, nn.Module)), None)
    place = choose_device(given.device, loaded)
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    names = [name.strip() for name in names if name.strip()]
    inputs = [find_model(model, given.trust_remote_code) for model in models]
    return TaskRun(
        models=tuple((model, model.fitting_tokenizer(given.tokenizer)) for model in inputs),
        tasks=tuple(load_tasks(names, given.fewshot, given.limit, data_folder(given.data))),
        batch=_CPU_BATCH if given.batch == "auto" and place.type == "cpu" else given.batch,
        options=ComputeOptions(given.dtype, place, trust_remote_code=given.trust_remote_code),
    )
