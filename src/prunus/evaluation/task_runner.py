"""Models on tasks of lm-eval: checked before weights are read, and scored.

Each task is scored by itself. Its score does not depend on the other tasks of the call.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from torch import nn

from prunus.calibration.corpora import data_folder
from prunus.distributed import fail_together, is_rank_0, on_rank_0, set_location
from prunus.engine.progress import Shown, shows_progress
from prunus.evaluation.eval_options import TaskOptions
from prunus.evaluation.eval_records import TaskResults, TaskScore
from prunus.evaluation.model_input import (
    ComputeOptions,
    ModelInput,
    check_as_loaded,
    find_model,
    unchanged,
)
from prunus.evaluation.tasks import LoadedTask, load_tasks, run_task, wrap_model
from prunus.model.device import choose_device
from prunus.options import takes
from prunus.words import require_library

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
        model_or_path: A folder (a checkpoint or an adapter), a hub id, or a loaded transformers
            model. A loaded model is evaluated on its device and in its dtype, with the tokenizer of
            its `name_or_path`.
        tasks: A list of names, or one string with commas. Names are tasks, tags and groups of
            lm-eval, or `paper7` for the Wanda paper's boolq, rte, hellaswag, winogrande, arc_easy,
            arc_challenge and openbookqa.
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called with a line of text after every task.
        **options: See `TaskOptions`. The folder `data` contains the rows in `zeroshot/`.

    Returns:
        The scores of the model, one per task or group, and how it was computed.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, ModuleNotFoundError, OSError: Before any
            work where possible; says what was given, what is wrong and what to do.
    """
    run = prepare_tasks([model_or_path], tasks, **options)
    return run.run(progress if callable(progress) else None)[0]


@dataclass(frozen=True)
class TaskRun:
    """Models with their tokenizers, and tasks with their rows. `prepare_tasks` checks them."""

    #: Each model with its tokenizer.
    models: tuple[tuple[ModelInput, Any], ...]
    #: The tasks with their rows.
    tasks: tuple[LoadedTask, ...]
    #: Sequences per forward pass, or "auto" for what fits on the device.
    batch: int | str
    #: How the models are computed.
    options: ComputeOptions

    def run(self, progress: Callable[[str], None] | None = None) -> list[TaskResults]:
        """Evaluate model after model. Only one of them is in memory at a time.

        Several processes split the rows of each task, and all get the same scores.

        Args:
            progress: Called on rank 0 with a line of text after every task.

        Raises:
            ValueError: Outputs are not finite, a tokenizer belongs to another model, or a
                checkpoint was changed meanwhile.
        """
        choose_device(str(self.options.device))
        results = []
        for model, tokenizer in self.models:
            scores: list[TaskScore] = []
            set_location(f"loading {model.name}")
            with unchanged(model.folder):
                with fail_together():
                    loaded = model.load(self.options)
                    wrapped = wrap_model(loaded, tokenizer, self.batch)
                for task in self.tasks:
                    set_location(f"{task.name} of {model.name}")
                    of_task = run_task(task, wrapped)
                    # lm-eval returns the scores on rank 0 alone.
                    sent = on_rank_0(partial(list, [asdict(score) for score in of_task]))
                    of_task = of_task or [TaskScore(**score) for score in sent]
                    if progress is not None and is_rank_0():
                        progress(f"{model.name}: {task.name} done in {of_task[0].seconds:.0f} s")
                    scores += of_task
            # Free this model's memory before the next one is loaded.
            del wrapped, loaded
            gc.collect()
            protocol = self.options.protocol(self.batch, model.loaded)
            protocol["versions"] |= {"lm_eval": version("lm_eval")}
            results.append(TaskResults(model.name, tuple(scores), protocol))
        return results


def prepare_tasks(
    models: Sequence[Any], tasks: str | Sequence[str] = "paper7", **options: Any
) -> TaskRun:
    """Check models and tasks before any work; see `evaluate` for arguments and errors."""
    require_library("lm_eval", "evaluating on tasks", "eval")
    chosen = TaskOptions.read(None, options)
    for model in models:
        check_as_loaded(model, chosen.dtype, chosen.device)
    loaded = next((model for model in models if isinstance(model, nn.Module)), None)
    device = choose_device(chosen.device, loaded)
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    names = [name.strip() for name in names if name.strip()]
    checked = []
    for model in [find_model(model, chosen.trust_remote_code) for model in models]:
        tokenizer, size = model.tokenizer(chosen.tokenizer), model.vocabulary
        # Special tokens that were added past the end of the embedding may never occur.
        if size is not None and tokenizer.vocab_size > size:
            raise ValueError(
                f"{model.name}: its tokenizer has {tokenizer.vocab_size} tokens, the model a "
                f"vocabulary of {size}; the tokenizer does not fit, is it another model's?"
            )
        checked.append((model, tokenizer))
    return TaskRun(
        models=tuple(checked),
        tasks=tuple(load_tasks(names, chosen.fewshot, chosen.limit, data_folder(chosen.data))),
        batch=_CPU_BATCH if chosen.batch == "auto" and device.type == "cpu" else chosen.batch,
        options=ComputeOptions(chosen.dtype, device, trust_remote_code=chosen.trust_remote_code),
    )
