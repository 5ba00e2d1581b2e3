"""Models on tasks, zero-shot or few-shot: checked, looked up in the cache, and scored.

Every check that needs no weights runs before any weights are read. Each task is scored by itself.
Its score therefore does not depend on the other tasks of the call, and it is cached as soon as it
is known.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.calibration.corpora import data_folder
from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.evaluation.cache import ResultCache, checkpoint_digest, environment
from prunus.evaluation.model_input import ModelInput, resolve_model_input
from prunus.evaluation.task_scores import Metric, TaskResults, TaskScore
from prunus.evaluation.tasks import LoadedTask, load_tasks, require_lm_eval, run_task, wrap_model
from prunus.model.device import choose_device
from prunus.model.dtypes import DTYPES, check_dtype
from prunus.model.loading import load_model
from prunus.runs.progress_bar import Shown, shows_progress

__all__ = ["TaskRun", "evaluate", "prepare_tasks"]

#: Sequences at once for batch "auto" on a CPU, where no device memory limits the batch.
_CPU_BATCH = 8


@shows_progress("evaluate", lambda line: Shown(None, line))
def evaluate(
    model_or_path: Any,
    tasks: str | Sequence[str] = "paper7",
    *,
    tokenizer: Any = None,
    fewshot: int | None = None,
    limit: int | None = None,
    batch: int | str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    data_dir: Path | None = None,
    cache: Path | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | bool | None = True,
) -> TaskResults:
    """Accuracy of a causal language model on tasks of lm-eval.

    Args:
        model_or_path: a folder (dense, packed, or an adapter), a hub id, or a loaded transformers
            model. A loaded model is evaluated on its device and in its dtype, and its results are
            not cached.
        tasks: a list of names, or one string with commas. Names are tasks, tags and groups of
            lm-eval, or `paper7` for the Wanda paper's boolq, rte, hellaswag, winogrande, arc_easy,
            arc_challenge and openbookqa.
        tokenizer: the tokenizer of a loaded model. None takes the one in the model's folder.
        fewshot: worked examples per prompt. None takes the task's own number, which is 0 for the
            paper's tasks.
        limit: score only this many rows of each task, from the first on. None scores all.
        batch: sequences in one forward pass. "auto" is 8 on a CPU, and what fits in memory on a
            CUDA device.
        dtype: dtype of the computation: auto (the checkpoint's own), float32, bfloat16 or float16.
        device: auto (CUDA if there is a device), cpu, cuda or cuda:i.
        data_dir: local folder whose `zeroshot/` contains the rows. None takes the folder in
            PRUNUS_DATA, or the hub if that is unset.
        cache: folder with earlier results, to which new results are added. None uses no cache.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called with a line of text after every task.

    Raises:
        ModuleNotFoundError: lm-eval is not installed, or an adapter is given and peft is not; names
            the extra.
        ValueError: an argument is out of range, a task is unknown, a tokenizer or an adapter does
            not fit, a model cannot be loaded, or outputs are not finite.
        FileNotFoundError: no such model, or the data folder lacks files (the message names them).
        OSError: the hub does not answer.
    """
    job = prepare_tasks(
        [model_or_path],
        tasks,
        tokenizer=tokenizer,
        fewshot=fewshot,
        limit=limit,
        batch=batch,
        dtype=dtype,
        device=device,
        data_dir=data_dir,
        cache=cache,
        trust_remote_code=trust_remote_code,
    )
    return job.run(progress if callable(progress) else None)[0]


@dataclass(frozen=True)
class TaskRun:
    """Models and tasks that were checked together. `prepare_tasks` creates it.

    Attributes:
        models: the models to evaluate.
        tasks: the tasks, with their rows.
        batch: sequences in one forward pass, or "auto".
        dtype: dtype of the computation, or "auto".
        device: device of the computation.
        cache: earlier results, or None.
        trust_remote_code: run model code that comes with a checkpoint.
    """

    models: tuple[ModelInput, ...]
    tasks: tuple[LoadedTask, ...]
    batch: int | str
    dtype: str
    device: torch.device
    cache: ResultCache | None
    trust_remote_code: bool

    def run(
        self, progress: Callable[[str], None] | None = None, ranks: Ranks = SINGLE_PROCESS
    ) -> list[TaskResults]:
        """Evaluate one model after the other. A model is loaded only if a result is missing.

        Args:
            progress: called with a line of text after every task, on rank 0.
            ranks: processes that make this call together and split the rows, each with the whole
                model.
        """
        choose_device(str(self.device), processes=ranks.local_size)
        report = progress if progress is not None and ranks.rank == 0 else lambda _: None
        return [self._evaluate(model, report, ranks) for model in self.models]

    def _evaluate(
        self, model: ModelInput, report: Callable[[str], None], ranks: Ranks
    ) -> TaskResults:
        protocol = self._protocol(model)
        key: dict[str, Any] | None = None
        if self.cache is not None and model.folder is not None:
            digest = checkpoint_digest(model.folder, self.trust_remote_code)
            key = {"kind": "task", "checkpoint": digest, **protocol}
        wrapped: Any = None
        scores: list[TaskScore] = []
        for task in self.tasks:
            task_key = (
                None if key is None else {**key, "task": task.name, "definition": task.definition}
            )
            ranks.set_location(f"{task.name} of {model.name}")
            known = ranks.on_rank_0(partial(self._find_cached, task_key))
            if known is not None:
                # The rows may have come from another source then, with the same content.
                found = [
                    replace(_from_json(score), source=task.source) for score in known["scores"]
                ]
                report(f"{model.name}: {task.name} found in the cache")
            else:
                if wrapped is None:
                    with ranks.fail_together():
                        wrapped = wrap_model(self._load(model), model.tokenizer, self.batch, ranks)
                found = self._score(task, wrapped, ranks)
                report(f"{model.name}: {task.name} done in {found[0].seconds:.0f} s")
                if self.cache is not None and task_key is not None and ranks.rank == 0:
                    trouble = self.cache.put(
                        task_key, {"scores": [_to_json(score) for score in found]}
                    )
                    if trouble is not None:
                        report(trouble)
            scores += found
        del wrapped
        # Free this model's memory before the next one is loaded.
        gc.collect()
        return TaskResults(model.name, tuple(scores), protocol)

    def _score(self, task: LoadedTask, wrapped: Any, ranks: Ranks) -> list[TaskScore]:
        """Score one task on all ranks. lm-eval returns the scores on rank 0, which sends them."""
        on_rank_0 = run_task(task, wrapped)
        sent = ranks.on_rank_0(partial(list, map(_to_json, on_rank_0 or [])))
        return on_rank_0 or [replace(_from_json(score), cached=False) for score in sent]

    def _find_cached(self, key: dict[str, Any] | None) -> dict[str, Any] | None:
        found = None if self.cache is None or key is None else self.cache.get(key)
        if found is None:
            return None
        try:
            # A damaged entry is as good as none: its figures must be figures.
            for score in map(_from_json, found["scores"]):
                score.as_dict()
                float(score.rows + score.shots + score.seconds)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return None
        return found

    def _load(self, model: ModelInput) -> Any:
        if model.folder is None:
            return model.loaded
        dtype = DTYPES.get(self.dtype, "auto")
        return load_model(model.folder, dtype, self.trust_remote_code).to(self.device)

    def _protocol(self, model: ModelInput) -> dict[str, Any]:
        """How the model is evaluated: dtype, batch, device and versions."""
        known = environment(self.device)
        loaded = model.loaded
        return known | {
            "dtype": self.dtype if loaded is None else str(loaded.dtype).removeprefix("torch."),
            "batch": self.batch,
            "versions": known["versions"] | {"lm_eval": version("lm_eval")},
        }


def prepare_tasks(
    models: Sequence[Any],
    tasks: str | Sequence[str] = "paper7",
    *,
    tokenizer: Any = None,
    fewshot: int | None = None,
    limit: int | None = None,
    batch: int | str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    data_dir: Path | None = None,
    cache: Path | None = None,
    trust_remote_code: bool = False,
) -> TaskRun:
    """Check models and tasks before any work, so that all models are evaluated on the same rows.

    Args:
        models: folders, hub ids or loaded transformers models.
        tasks: see `evaluate`, as are all other arguments and the errors.
        tokenizer: the tokenizer of a loaded model. None takes the one in each model's folder.
        fewshot: worked examples per prompt. None takes the task's own number.
        limit: score only this many rows of each task. None scores all.
        batch: sequences in one forward pass, or "auto".
        dtype: dtype of the computation: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda or cuda:i.
        data_dir: local folder whose `zeroshot/` contains the rows. None takes PRUNUS_DATA, or the
            hub.
        cache: folder with earlier results, or None.
        trust_remote_code: run model code that comes with a checkpoint.

    Returns:
        The checked models and tasks; call `run` on it.
    """
    require_lm_eval()
    if fewshot is not None and fewshot < 0:
        raise ValueError(f"fewshot must be 0 or more examples, not {fewshot}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 row, not {limit}")
    if batch != "auto" and (not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch must be 'auto' or at least 1, not {batch!r}")
    check_dtype(dtype)
    loaded = next((model for model in models if isinstance(model, nn.Module)), None)
    if loaded is not None and (dtype != "auto" or device != "auto"):
        raise ValueError(
            "a loaded model is evaluated as it is: leave dtype and device at 'auto', or convert it "
            "before"
        )
    place = choose_device(device, loaded)
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    names = [name.strip() for name in names if name.strip()]
    return TaskRun(
        models=tuple(resolve_model_input(model, tokenizer, trust_remote_code) for model in models),
        tasks=tuple(load_tasks(names, fewshot, limit, data_folder(data_dir))),
        batch=_CPU_BATCH if batch == "auto" and place.type == "cpu" else batch,
        dtype=dtype,
        device=place,
        cache=None if cache is None else ResultCache(cache),
        trust_remote_code=trust_remote_code,
    )


def _to_json(score: TaskScore) -> dict[str, Any]:
    """A score for the cache. Outcomes of single rows are kept, because `compare` pairs them."""
    metrics = {
        name: [metric.value, metric.stderr, metric.outcomes]
        for name, metric in score.metrics.items()
    }
    return {**vars(score), "metrics": metrics}


def _from_json(content: dict[str, Any]) -> TaskScore:
    metrics = {
        name: Metric(value, stderr, None if outcomes is None else tuple(outcomes))
        for name, (value, stderr, outcomes) in content["metrics"].items()
    }
    return TaskScore(**{**content, "metrics": metrics, "cached": True})
