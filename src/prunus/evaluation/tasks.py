"""Tasks as EleutherAI's lm-eval defines them. This is the only file that imports lm-eval.

Prompts, targets, scoring and few-shot examples are lm-eval's own. A local folder only changes the
source of the rows, by lm-eval's own hook `custom_dataset`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from prunus.distributed import ranks
from prunus.evaluation.eval_records import PAPER7, Metric, TaskScore
from prunus.evaluation.local_tasks import FOLDER, load_splits, local_files
from prunus.hardware.process_state import no_warnings, replaced
from prunus.hardware.words import did_you_mean, reason

#: Held by the thread that uses lm-eval; see `_quiet_lm_eval`.
_LM_EVAL = RLock()
#: lm-eval's own seed for drawing few-shot examples.
SEED = 1234
#: Bootstrap draws for the standard error of a metric without a formula. lm-eval's 100,000 take
#: minutes.
_BOOTSTRAP_DRAWS = 1000
#: The folders of lm-eval that define the tasks of paper7, and LAMBADA. Its whole catalogue takes
#: many seconds to read.
_LOCAL_TASK_FOLDERS = (
    "super_glue/boolq",
    "glue/rte",
    "hellaswag",
    "winogrande",
    "arc",
    "openbookqa",
    "lambada",
)


@dataclass(frozen=True)
class LoadedTask:
    """A task, or a group of tasks, with its rows."""

    #: Its name in lm-eval.
    name: str
    #: SHA-256 of everything that makes the prompts and the scoring: templates, rows, examples,
    #: limit, lm-eval's version.
    definition: str
    #: Where the rows come from.
    source: str
    #: Only the first rows of each task are scored, as many as this; None scores all.
    limit: int | None
    #: What lm-eval evaluates: its own objects, with the tasks by name under "tasks".
    content: Any


def load_tasks(
    names: Sequence[str],
    shots: int | None = None,
    limit: int | None = None,
    folder: Path | None = None,
) -> list[LoadedTask]:
    """Find tasks in lm-eval's catalogue and load their rows.

    Args:
        names: Tasks, tags and groups of lm-eval, or `paper7`.
        shots: Worked examples per prompt; None takes the number of each task.
        limit: Score only the first rows of each task; None scores all.
        folder: Data folder with the rows; None downloads them.

    Raises:
        ValueError: A task is unknown or runs code, or local rows are damaged.
        FileNotFoundError: The data folder lacks a file.
        OSError: Rows could not be downloaded.
    """
    if not names:
        raise ValueError("no tasks are named; give some, such as paper7")
    with _quiet_lm_eval():
        catalogue = _catalogue(names)
        expanded = [task for name in names for task in _expand(name, catalogue)]
        configs = {name: _config(name, catalogue) for name in expanded}
        files = {} if folder is None else local_files(folder, configs, shots)
        return [_load(name, catalogue, shots, limit, files.get(name)) for name in configs]


def wrap_model(model: Any, tokenizer: Any, batch: int | str) -> Any:
    """Wrap a loaded transformers model for lm-eval.

    Batch "auto" lets lm-eval try which size fits on a CUDA device. Of n ranks, rank r gets the rows
    r, r + n, r + 2n and so on, as with lm-eval's own launcher.

    Args:
        model: A loaded transformers model, which is scored where it is.
        tokenizer: Its tokenizer.
        batch: Sequences per forward pass, or "auto".
    """
    with _quiet_lm_eval():
        from lm_eval.models.huggingface import HFLM

        class RankedModel(HFLM):
            """A model with its ranks, which lm-eval sets only for models that it loads itself."""

            rank, world_size = ranks().rank, ranks().size

            def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
                """The values of all ranks, as one vector on the CPU."""
                return ranks().all_gather(tensor.reshape(-1).cpu())

            def barrier(self) -> None:
                """Wait for all ranks."""
                ranks().gather_ints([0])

        return RankedModel(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch
        )


def run_task(task: LoadedTask, wrapped: Any) -> list[TaskScore]:
    """Score one task with a model of `wrap_model`. All ranks call it.

    Returns:
        The scores, that of a group before those of its members. They are empty on other ranks
        than 0.

    Raises:
        ValueError: Outputs are not finite, or the tokenizer belongs to another model.
    """
    started = time.perf_counter()
    with _quiet_lm_eval(), torch.random.fork_rng():
        import lm_eval

        # The seed matters for tasks that sample text. Tasks that compare likelihoods draw nothing.
        torch.manual_seed(SEED)
        for member in task.content["tasks"].values():
            member.set_fewshot_seed(seed=SEED)
        try:
            evaluated = lm_eval.evaluate(
                lm=wrapped,
                task_dict=task.content,
                limit=task.limit,
                bootstrap_iters=_BOOTSTRAP_DRAWS,
            )
        except IndexError as fault:
            # These are torch's words for an id that is outside the embedding.
            if "index out of range in self" not in str(fault):
                raise
            raise ValueError(
                f"{task.name}: the tokenizer gives ids beyond the "
                f"{wrapped.model.get_input_embeddings().num_embeddings} rows of the model's "
                "embedding: it belongs to another model"
            ) from fault
    if evaluated is None:
        return []
    seconds = time.perf_counter() - started
    # Only tasks have samples, so groups come first.
    names = sorted(evaluated["results"], key=lambda name: name in evaluated["samples"])
    return [_read_score(evaluated, name, task, seconds) for name in names]


# --- results ---


def _read_score(
    evaluated: Mapping[str, Any], name: str, task: LoadedTask, seconds: float
) -> TaskScore:
    """The score of one task or group among those that `lm_eval.evaluate` returned."""
    results = evaluated["results"][name]
    # Several ranks return the rows in another order. Two models are compared row by row, so we
    # sort.
    samples = sorted(evaluated["samples"].get(name, []), key=lambda row: row["doc_id"])
    # Log-likelihoods that are NaN are refused: lm-eval would choose among them and score the
    # choice.
    for row in samples:
        for response in row["filtered_resps"]:
            first = response[0] if isinstance(response, tuple | list) and response else response
            if isinstance(first, float) and math.isnan(first):
                raise ValueError(
                    f"{name}, row {row['doc_id']}: the model's outputs are not finite. Damaged "
                    "weights, or a dtype too small for this model; try `dtype` float32"
                )
    return TaskScore(
        task=name,
        metrics=_metrics(results, samples),
        shots=int(evaluated["n-shot"].get(name) or 0),
        rows=int(results.get("sample_len", len(samples))),
        version=str(evaluated["versions"].get(name)),
        definition=task.definition,
        source=task.source,
        seconds=seconds,
    )


def _metrics(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    """Read the metrics of one task.

    lm-eval's keys are `metric,filter` and `metric_stderr,filter`; "N/A" is an unknown error.

    >>> list(_metrics({"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "rte"}, []).items())
    [('acc', Metric(value=0.5, stderr=None, outcomes=None))]
    """
    metrics = {}
    for key, value in results.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results.get(f"{name}_stderr,{kind}")
        outcomes: list[Any] = [row.get(name) for row in samples if row["filter"] == kind]
        # The value may be another figure than the mean of the rows, such as a perplexity.
        is_mean = (
            outcomes
            and all(isinstance(outcome, int | float) for outcome in outcomes)
            and math.isclose(sum(outcomes) / len(outcomes), value, abs_tol=1e-9)
        )
        metrics[name if kind == "none" else f"{name} ({kind})"] = Metric(
            float(value),
            float(error) if isinstance(error, int | float) else None,
            tuple(map(float, outcomes)) if is_mean else None,
        )
    return metrics


# --- the catalogue ---


def _catalogue(names: Sequence[str]) -> Any:
    """lm-eval's task manager. It knows only the tasks of paper7 and LAMBADA if these are enough."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / name for name in _LOCAL_TASK_FOLDERS if (root / name).is_dir()]
    small = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)
    requested = {task for name in names for task in (PAPER7 if name == "paper7" else (name,))}
    # Only for tasks: a tag such as `ai2_arc` may have more members in the whole catalogue.
    return small if requested <= set(small.all_subtasks) else lm_eval.tasks.TaskManager()


def _expand(name: str, catalogue: Any) -> list[str]:
    """The tasks of an alias or a tag. A group stays one task: it has a score of its own."""
    if name == "paper7":
        return list(PAPER7)
    entry = catalogue.task_index.get(name)
    if entry is None:
        raise ValueError(
            f"unknown task {name!r}: `lm-eval ls tasks` lists them"
            f"{did_you_mean(name, ['paper7', *catalogue.all_tasks])}"
        )
    return sorted(entry.tags) if name in catalogue.all_tags else [name]


def _config(name: str, catalogue: Any) -> Mapping[str, Any] | None:
    """The definition of a single task; None for a group, and for a task that is Python code."""
    config = catalogue.task_index[name].cfg or {}
    return config if name in catalogue.all_subtasks and "class" not in config else None


# --- loading ---


def _load(
    name: str,
    catalogue: Any,
    shots: int | None,
    limit: int | None,
    files: Mapping[str, Path | None] | None,
) -> LoadedTask:
    """Load a task with its rows: from `files` by split, or from the hub if that is None."""
    if files is None:
        config = _config(name, catalogue) or {}
        source = f"{config.get('dataset_path', 'several datasets')}, from the hub"
        try:
            content = catalogue.load([name])
        except Exception as fault:  # the hub, its cache and a task's own code raise many kinds
            raise OSError(
                f"the rows of {name} could not be loaded ({reason(fault)}). Without a network, "
                f"give a folder of `data` (or PRUNUS_DATA) that holds {FOLDER}/"
            ) from fault
    else:
        scored = next(iter(files.values()))
        assert scored is not None, "local_files has seen it"
        source = f"{FOLDER}/{scored.name}"
        rows = load_splits(name, files)
        # lm-eval overrides a field of a task that it ships only inside a group, so we make a group
        # of one.
        group = {"group": "local", "task": [{"task": name, "custom_dataset": lambda **_: rows}]}
        try:
            content = catalogue.load([group]) | {"groups": {}, "group_map": {}}
        except Exception as fault:  # of a template or of a task's code, which misses a column
            raise ValueError(
                f"{scored}: lm-eval cannot make prompts of the rows ({reason(fault)})"
            ) from fault
    digest = hashlib.sha256(json.dumps([version("lm_eval"), SEED]).encode())
    for task in content["tasks"].values():
        _set_shots(task, shots)
        digest.update(_definition(task, limit).encode())
    return LoadedTask(name, digest.hexdigest(), source, limit, content)


def _set_shots(task: Any, shots: int | None) -> None:
    """Set the number of worked examples of a task; None takes the number of the task, or else 0.

    Raises:
        ValueError: The task fixes its number, or runs code that a model wrote.
    """
    name = task.config.task
    default = task.config.num_fewshot
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(f"{name} runs code that a model wrote; use lm-eval itself, in a sandbox")
    if default == 0 and shots:
        raise ValueError(f"{name} fixes its number of examples at 0; leave `fewshot` out for it")
    if default is None or shots is not None:
        task.set_config(key="num_fewshot", value=shots or 0)


def _definition(task: Any, limit: int | None) -> str:
    """Everything that determines a task's prompts and scoring, as text without local paths."""
    config = {key: value for key, value in task.dump_config().items() if key != "custom_dataset"}
    # The metadata also has the path of lm-eval's file and of the rows, which differ between
    # computers.
    config["metadata"] = {"version": (config.get("metadata") or {}).get("version")}
    # `task_docs` is `eval_docs`, computed already.
    docs = getattr(task, "task_docs", None) or task.eval_docs
    rows = [docs[index] for index in range(len(docs) if limit is None else min(limit, len(docs)))]
    examples = list(task.sampler.df) if task.config.num_fewshot and hasattr(task, "sampler") else []
    return json.dumps([config, rows, examples], sort_keys=True, default=_as_text)


def _as_text(value: Any) -> str:
    """A value as text. A function is named: lm-eval's version stands for its code."""
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else str(value)


@contextlib.contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval, except for progress bars on a terminal. Stdout is for results alone.

    One thread at a time runs it, because the state of random numbers, the logger and the variable
    belong to the whole process.
    """
    with _LM_EVAL:
        logger = logging.getLogger("lm_eval")
        level, before = logger.level, os.environ.get("DISABLE_MULTIPROC")
        logger.setLevel(logging.ERROR)
        # Otherwise lm-eval forks this process, with the model and its threads, to compute the
        # bootstrap.
        os.environ["DISABLE_MULTIPROC"] = "1"
        errors = sys.stderr if sys.stderr.isatty() else io.StringIO()
        try:
            with replaced(sys, "stderr", errors), replaced(sys, "stdout", errors), no_warnings():
                yield
        finally:
            logger.setLevel(level)
            os.environ.pop("DISABLE_MULTIPROC")
            os.environ.update({} if before is None else {"DISABLE_MULTIPROC": before})
