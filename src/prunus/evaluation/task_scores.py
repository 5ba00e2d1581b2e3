"""Models on tasks of EleutherAI's lm-eval, by its own function `simple_evaluate`.

Tasks, prompts, scores and the file of results are lm-eval's. This is the only file that imports it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prunus.calibration.corpora import data_folder
from prunus.distributed.group import started_by_torchrun
from prunus.evaluation.eval_options import TaskOptions
from prunus.evaluation.eval_records import PAPER7
from prunus.evaluation.model_input import (
    ComputeOptions,
    ModelInput,
    check_as_loaded,
    find_model,
    unchanged,
)
from prunus.hardware.process_state import no_warnings, replaced
from prunus.model.device import choose_device
from prunus.options import takes
from prunus.words import did_you_mean, reason, require_library

#: Sequences at once for batch "auto" on a CPU, where no device memory limits the batch.
_CPU_BATCH = 8
#: Bootstrap draws for the standard error of a metric without a formula. lm-eval's 100,000 take
#: minutes.
_BOOTSTRAP_DRAWS = 1000
#: The folder with lm-eval's definition of the group `paper7`.
_OWN_TASKS = Path(__file__).parent / "tasks"


@takes(TaskOptions)
def evaluate(
    model_or_path: Any,
    tasks: str | Sequence[str] = "paper7",
    *,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Score a causal language model on tasks of lm-eval.

    Args:
        model_or_path: A folder, a hub id, or a loaded transformers model. A loaded model is
            evaluated on its device and in its dtype, with the tokenizer of its `name_or_path`.
        tasks: A list of names, or one string with commas. Names are tasks, tags and groups of
            lm-eval, or `paper7` for the Wanda paper's boolq, rte, hellaswag, winogrande, arc_easy,
            arc_challenge and openbookqa.
        progress: Whether lm-eval shows its bars on a terminal.
        **options: See `TaskOptions`.

    Returns:
        The content of lm-eval's file of results, and the rows under "samples".

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, ModuleNotFoundError, OSError: Before any
            work where possible; says what was given, what is wrong and what to do.
    """
    [score] = prepare_tasks([model_or_path], tasks, **options)
    return score(progress)


def prepare_tasks(
    models: Sequence[Any], tasks: str | Sequence[str] = "paper7", **options: Any
) -> list[Callable[[bool], dict[str, Any]]]:
    """Check models and tasks before any work; see `evaluate` for arguments and errors.

    Returns:
        For each model the function that scores it, which takes `progress`.
    """
    require_library("lm_eval", "evaluating on tasks", "eval")
    if started_by_torchrun():
        raise ValueError(
            "tasks run in one process here. For several, give the model to lm-eval itself "
            "(accelerate launch -m lm_eval): `prunus report` reads its file of results"
        )
    chosen = TaskOptions.read(None, options)
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    names = [name.strip() for name in names if name.strip()]
    checked = []
    for model in models:
        check_as_loaded(model, chosen.dtype, chosen.device)
        found = find_model(model, chosen.trust_remote_code)
        tokenizer, size = found.tokenizer(chosen.tokenizer), found.vocabulary
        # Special tokens that were added past the end of the embedding may never occur.
        if size is not None and tokenizer.vocab_size > size:
            raise ValueError(
                f"{found.name}: its tokenizer has {tokenizer.vocab_size} tokens, the model a "
                f"vocabulary of {size}; the tokenizer does not fit, is it another model's?"
            )
        checked.append((found, tokenizer))
    how = {"tasks": names, "task_manager": _find_tasks(names, chosen)}
    how |= {"num_fewshot": chosen.fewshot, "limit": chosen.limit}
    how["bootstrap_iters"] = _BOOTSTRAP_DRAWS
    return [partial(_score, *pair, chosen, how) for pair in checked]


def _find_tasks(names: list[str], chosen: TaskOptions) -> Any:
    """lm-eval's task manager, after it has found the tasks and loaded their rows once."""
    from lm_eval.tasks import TaskManager

    if not names:
        raise ValueError("no tasks are named; give some, such as paper7")
    if (given := chosen.include_path) is not None and not given.is_dir():
        raise FileNotFoundError(f"include_path {given} is not a folder of lm-eval's YAML files")
    paths = [_OWN_TASKS, *([] if given is None else [given])]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    data = data_folder(chosen.data)
    metadata = {} if data is None else {"data": str(data)}
    every = {task for name in names for task in (PAPER7 if name == "paper7" else (name,))}
    catalogue = TaskManager(include_defaults=False, include_path=paths, metadata=metadata)
    # lm-eval's own catalogue takes many seconds to read.
    if not every <= set(catalogue.all_tasks):
        catalogue = TaskManager(include_path=paths, metadata=metadata)
    if unknown := sorted(every - set(catalogue.all_tasks)):
        raise ValueError(
            f"unknown task {unknown[0]!r}: `lm-eval ls tasks` lists them"
            f"{did_you_mean(unknown[0], ['paper7', *catalogue.all_tasks])}"
        )
    try:
        with _silent(progress=False):
            catalogue.load(names)
    except Exception as fault:  # of the hub, its cache, a template or a task's own code
        raise OSError(
            f"the rows of {', '.join(names)} could not be loaded ({reason(fault)}). Without a "
            "network, give `include_path` a folder of tasks with rows of your own, such as "
            "examples/tasks"
        ) from fault
    return catalogue


def _score(
    model: ModelInput, tokenizer: Any, chosen: TaskOptions, how: Mapping[str, Any], progress: bool
) -> dict[str, Any]:
    """Score one model; see `evaluate`."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM

    # Otherwise lm-eval forks this process, with the model and its threads, for standard errors.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    device = choose_device(chosen.device, model.loaded)
    batch = _CPU_BATCH if chosen.batch == "auto" and device.type == "cpu" else chosen.batch
    compute = ComputeOptions(chosen.dtype, device)
    with unchanged(model.folder), TemporaryDirectory() as folder, _silent(progress):
        tracker = EvaluationTracker(output_path=folder)
        lm = HFLM(
            model.load_model(compute), tokenizer=tokenizer, backend="causal", batch_size=batch
        )
        found = simple_evaluate(lm, batch_size=batch, evaluation_tracker=tracker, **how)
        assert found is not None, "this is the only process"
        samples = found.pop("samples")
        tracker.save_results_aggregated(found, samples)
        [file] = Path(folder).rglob("results_*.json")
        # JSON has neither NaN nor infinity.
        results = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    for task, rows in samples.items():
        for row in rows:
            for response in row["filtered_resps"]:
                first = response[0] if isinstance(response, tuple | list) and response else response
                # lm-eval chooses among log-likelihoods that are NaN, and scores the choice.
                if isinstance(first, float) and math.isnan(first):
                    raise ValueError(
                        f"{task}, row {row['doc_id']}: the model's outputs are not finite. Damaged "
                        "weights, or a dtype too small for this model; try `dtype` float32"
                    )
    return results | {"model_name": model.name, "samples": samples}


@contextlib.contextmanager
def _silent(progress: bool) -> Any:
    """Keep lm-eval's words off stdout, which is for results; its bars are for terminals."""
    errors = sys.stderr if progress and sys.stderr.isatty() else io.StringIO()
    with replaced(sys, "stderr", errors), replaced(sys, "stdout", errors), no_warnings():
        yield
