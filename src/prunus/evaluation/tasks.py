"""Tasks as EleutherAI's lm-eval defines them: found, given their rows, run. The one file that knows lm-eval.

Prompts, targets, scoring and few-shot examples are lm-eval's own. All that a local mirror changes is where the rows
come from: lm-eval's own hook for that, `custom_dataset`, is set beside the definition that lm-eval ships.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.evaluation.lm_eval_results import read_scores
from prunus.evaluation.local_datasets import FOLDER, check_local_datasets, load_splits
from prunus.evaluation.task_scores import PAPER7, TaskScore

__all__ = ["LoadedTask", "load_tasks", "require_lm_eval", "run_task", "wrap_model"]

ALIASES = {"paper7": PAPER7}
SEED = 1234  # lm-eval's own, of the draw of few-shot examples
_BOOTSTRAP = (
    1000  # draws for the standard error of what has no formula (lm-eval's own 100,000 take minutes)
)
# Where lm-eval keeps the tasks of a mirror: reading its whole catalogue takes many seconds.
_HOMES = ("super_glue/boolq", "glue/rte", "hellaswag", "winogrande", "arc", "openbookqa", "lambada")


@dataclass(frozen=True)
class LoadedTask:
    """A task, or a group of tasks, with its rows.

    Attributes:
        name: as users call it.
        definition: SHA-256 over what makes prompts and scoring: templates, rows, examples, limit, lm-eval's version.
        source: where the rows came from.
        content: lm-eval's own objects.
    """

    name: str
    definition: str
    source: str
    limit: int | None
    content: Any


def require_lm_eval() -> None:
    """Raise ModuleNotFoundError, naming the extra, unless lm-eval is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError("judging on tasks needs lm-eval: pip install 'prunus[eval]'")


def load_tasks(
    names: Sequence[str],
    shots: int | None = None,
    limit: int | None = None,
    mirror: Path | None = None,
) -> list[LoadedTask]:
    """Find tasks in lm-eval's catalogue and get their rows.

    Args:
        names: tasks, tags or groups of lm-eval, or `paper7`.
        shots: worked examples per prompt; None for the task's own number, which is mostly 0.
        limit: score at most this many rows of each task, the first ones.
        mirror: folder whose `zeroshot/` holds the rows (see `mirror.py`); None for the hub.

    Raises:
        ModuleNotFoundError: lm-eval is not installed; names the extra.
        ValueError: an unknown task (the message has the nearest names), none at all, a task with a fixed number of
            examples or unsafe code, a damaged row.
        FileNotFoundError: the mirror lacks files; names all of them, those of few-shot examples too.
        OSError: the hub does not answer.
    """
    require_lm_eval()
    if not names:
        raise ValueError("no tasks are named; give some, such as paper7")
    with _calmly():
        catalogue = _catalogue(names)
        expanded = [task for name in names for task in _expand(name, catalogue)]
        wanted = list(dict.fromkeys(expanded))
        if mirror is not None:
            check_local_datasets(mirror, {name: _config(name, catalogue) for name in wanted}, shots)
        return [_load(name, catalogue, shots, limit, mirror) for name in wanted]


def wrap_model(model: Any, tokenizer: Any, batch: int | str, ranks: Ranks = SINGLE_PROCESS) -> Any:
    """A loaded transformers model as lm-eval takes it; batch "auto" lets lm-eval try what fits (CUDA).

    Where there are several ranks, lm-eval gives each every so manieth row, as it does under its own launcher.
    """
    with _calmly():
        from lm_eval.models.huggingface import HFLM

        class Shared(HFLM):
            """lm-eval asks its model who shares the rows; it knows how for models that it loads itself only."""

            def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
                return ranks.all_gather(tensor.reshape(-1).cpu())

            def barrier(self) -> None:
                ranks.gather_ints([0])

        wrapped = Shared(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
        wrapped._rank, wrapped._world_size = ranks.rank, ranks.size
        return wrapped


def run_task(task: LoadedTask, wrapped: Any) -> list[TaskScore] | None:
    """Score one task; a group gives its own figures first, then those of its members.

    Of several ranks the first gets them, the others None.

    Raises:
        ValueError: a token id outside the model's vocabulary, outputs that are not finite.
    """
    began = time.perf_counter()
    with _calmly(), torch.random.fork_rng():
        import lm_eval

        torch.manual_seed(SEED)  # for tasks that sample; those of likelihoods draw nothing
        for one in task.content["tasks"].values():
            one.set_fewshot_seed(seed=SEED)
        try:
            found = lm_eval.evaluate(
                lm=wrapped, task_dict=task.content, limit=task.limit, bootstrap_iters=_BOOTSTRAP
            )
        except IndexError as fault:
            if "index out of range in self" not in str(
                fault
            ):  # torch's words for an embedding that is too small
                raise
            raise ValueError(
                f"{task.name}: the tokenizer gives ids outside the model's vocabulary; it does not fit ({fault})"
            ) from fault
    if found is None:
        return None
    seconds = time.perf_counter() - began
    return read_scores(found, definition=task.definition, source=task.source, seconds=seconds)


# --- the catalogue ---


def _catalogue(names: Sequence[str]) -> Any:
    """lm-eval's task manager: of the mirror's tasks alone where that is enough."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    homes = [root / home for home in _HOMES if (root / home).is_dir()]
    small = lm_eval.tasks.TaskManager(include_defaults=False, include_path=homes)
    wanted = {task for name in names for task in ALIASES.get(name, (name,))}
    # Not for a tag, such as `ai2_arc`: it may have members elsewhere.
    return small if wanted <= set(small.all_subtasks) else lm_eval.tasks.TaskManager()


def _expand(name: str, catalogue: Any) -> list[str]:
    """The tasks behind an alias or a tag; a group stays one, since it has figures of its own."""
    if name in ALIASES:
        return list(ALIASES[name])
    entry = catalogue.task_index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, [*ALIASES, *catalogue.all_tasks], n=4, cutoff=0.6)
        hint = (
            f"did you mean {', '.join(near)}?"
            if near
            else "lm-eval lists its own: lm-eval ls tasks"
        )
        raise ValueError(f"unknown task {name!r}: {hint}")
    return sorted(entry.tags) if name in catalogue.all_tags else [name]


def _config(name: str, catalogue: Any) -> Mapping[str, Any] | None:
    """The definition of a single task; None for a group, and for a task that is Python code."""
    config = catalogue.task_index[name].cfg or {}
    return config if name in catalogue.all_subtasks and "class" not in config else None


# --- loading ---


def _load(
    name: str, catalogue: Any, shots: int | None, limit: int | None, mirror: Path | None
) -> LoadedTask:
    config = _config(name, catalogue)
    spec: Any = name
    source = f"{(config or {}).get('dataset_path', 'several data sets')}, from the hub"
    if mirror is not None:
        assert config is not None, "check_local_datasets has seen it"
        rows, source = load_splits(mirror, name, config)
        # A group of one is lm-eval's way to override a field of a task that it ships.
        spec = {"group": "mirror", "task": [{"task": name, "custom_dataset": lambda **_: rows}]}
    try:
        content = catalogue.load([spec])
    except Exception as fault:  # whatever the hub, its cache or a task's own code raise
        if mirror is not None:
            raise
        raise OSError(
            f"the rows of {name} could not be had ({type(fault).__name__}: {str(fault)[:300]}). Without a network, "
            f"give a data folder (--data or PRUNUS_DATA) that holds {FOLDER}/"
        ) from fault
    if mirror is not None:
        content = {"tasks": content["tasks"], "groups": {}, "group_map": {}}
    digest = hashlib.sha256(json.dumps([version("lm_eval"), SEED]).encode())
    for task in content["tasks"].values():
        _set_shots(task, shots)
        digest.update(_definition(task, limit).encode())
    return LoadedTask(name, digest.hexdigest(), source, limit, content)


def _set_shots(task: Any, shots: int | None) -> None:
    name, own = task.config.task, task.config.num_fewshot
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(f"{name} runs code that a model wrote; use lm-eval itself, in a sandbox")
    if own == 0 and shots:
        raise ValueError(f"{name} fixes its number of examples at 0; leave --fewshot out for it")
    if own is None or shots is not None:
        task.set_config(key="num_fewshot", value=shots or 0)


def _definition(task: Any, limit: int | None) -> str:
    """Everything that decides a task's prompts and scoring, as text that is the same on every machine."""
    config = {key: value for key, value in task.dump_config().items() if key != "custom_dataset"}
    # The path of lm-eval's file, and where the rows came from, say nothing of the task.
    config["metadata"] = {"version": (config.get("metadata") or {}).get("version")}
    docs = (
        getattr(task, "task_docs", None) or task.eval_docs
    )  # the first is the second, computed already
    rows = [docs[index] for index in range(len(docs) if limit is None else min(limit, len(docs)))]
    examples = list(task.sampler.df) if task.config.num_fewshot and hasattr(task, "sampler") else []
    return json.dumps([config, rows, examples], sort_keys=True, default=_as_text)


def _as_text(value: Any) -> str:
    """A function as its source, for its repr holds an address."""
    if not callable(value):
        return str(value)
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"


@contextlib.contextmanager
def _calmly() -> Iterator[None]:
    """lm-eval without its chatter: bars on a terminal, nothing elsewhere; standard output is for results."""
    logger = logging.getLogger("lm_eval")
    level, before = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    # It would fork this process, model and threads included, to bootstrap.
    os.environ["DISABLE_MULTIPROC"] = "1"
    elsewhere = (
        contextlib.nullcontext()
        if sys.stderr.isatty()
        else contextlib.redirect_stderr(io.StringIO())
    )
    try:
        with elsewhere, contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
