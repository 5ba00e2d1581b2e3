"""Models on tasks, zero-shot or few-shot: checked, looked up among earlier results, and judged.

Everything that can be refused is refused before any weight is read. Each task is scored by itself, so that its
figure does not depend on which others are asked for, and is kept as soon as it is there.
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

__all__ = ["TaskRun", "evaluate", "prepare_tasks"]

_CPU_BATCH = 8  # sequences at once where "auto" has no memory of a card to fill


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
    progress: Callable[[str], None] | None = None,
) -> TaskResults:
    """Accuracy of a causal LM on tasks of lm-eval.

    Args:
        model_or_path: a folder (dense, packed, or an adapter), a hub id, or a loaded transformers model, which is
            judged where and as it is, and whose results are not cached.
        tasks: names or one string with commas: tasks, tags and groups of lm-eval, or `paper7` for the Wanda paper's
            boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa.
        tokenizer: for a loaded model; otherwise the one in the model's folder.
        fewshot: worked examples per prompt; None for the task's own number, which is 0 for those of the paper.
        limit: score at most this many rows of each task, the first ones.
        batch: sequences at once; "auto" is 8 on a CPU, and what fits on a card.
        dtype: auto (the checkpoint's own), float32, bfloat16 or float16.
        device: auto (CUDA where there is one), cpu, cuda, cuda:i.
        data_dir: folder whose `zeroshot/` holds the rows; None means the folder in PRUNUS_DATA, or the hub where
            that is unset.
        cache: folder to find earlier results in and to keep new ones; None for neither.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: told what is done.

    Raises:
        ModuleNotFoundError: lm-eval, or for an adapter peft, is not installed; names the extra.
        ValueError: arguments out of range, an unknown task, a tokenizer or an adapter that does not fit, a model that
            cannot be loaded, outputs that are not finite.
        FileNotFoundError: no such model, or a data folder that lacks files (the message names them).
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
    return job.run(progress)[0]


@dataclass(frozen=True)
class TaskRun:
    """Models and tasks that were found to fit each other; made by `prepare_tasks`."""

    candidates: tuple[ModelInput, ...]
    tasks: tuple[LoadedTask, ...]
    batch: int | str
    dtype: str
    device: torch.device
    cache: ResultCache | None
    trust_remote_code: bool

    def run(
        self, progress: Callable[[str], None] | None = None, ranks: Ranks = SINGLE_PROCESS
    ) -> list[TaskResults]:
        """Judge one model after the other; each is loaded only if a result is missing, and one at a time.

        Several `ranks` that call this alike share the rows, each with the whole model.
        """
        tell = progress if progress is not None and ranks.rank == 0 else lambda _: None
        return [self._judge(candidate, tell, ranks) for candidate in self.candidates]

    def _judge(
        self, candidate: ModelInput, progress: Callable[[str], None], ranks: Ranks
    ) -> TaskResults:
        protocol = self._protocol(candidate)
        key: dict[str, Any] | None = None
        if self.cache is not None and candidate.folder is not None:
            digest = checkpoint_digest(candidate.folder, self.trust_remote_code)
            key = {"kind": "task", "checkpoint": digest, **protocol}
        wrapped: Any = None
        scores: list[TaskScore] = []
        for task in self.tasks:
            entry = (
                None if key is None else {**key, "task": task.name, "definition": task.definition}
            )
            ranks.set_location(f"{task.name} of {candidate.name}")
            known = ranks.on_rank_0(partial(self._known, entry))
            if known is not None:
                found = [
                    replace(_from_json(score), source=task.source) for score in known["scores"]
                ]
                progress(f"{candidate.name}: {task.name} is known from before")
            else:
                if wrapped is None:
                    with ranks.fail_together():
                        wrapped = wrap_model(
                            self._load(candidate), candidate.tokenizer, self.batch, ranks
                        )
                scored = run_task(task, wrapped)
                said = ranks.on_rank_0(partial(list, map(_to_json, scored or [])))
                found = scored or [replace(_from_json(score), cached=False) for score in said]
                progress(f"{candidate.name}: {task.name} done in {found[0].seconds:.0f} s")
                if self.cache is not None and entry is not None and ranks.rank == 0:
                    trouble = self.cache.keep(
                        entry, {"scores": [_to_json(score) for score in found]}
                    )
                    if trouble is not None:
                        progress(trouble)
            scores += found
        del wrapped
        gc.collect()  # the next model need not find this one in memory
        return TaskResults(candidate.name, tuple(scores), protocol)

    def _known(self, entry: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if self.cache is None or entry is None else self.cache.find(entry)

    def _load(self, candidate: ModelInput) -> Any:
        if candidate.folder is None:
            return candidate.loaded
        dtype = DTYPES.get(self.dtype, "auto")
        return load_model(candidate.folder, dtype, self.trust_remote_code).to(self.device)

    def _protocol(self, candidate: ModelInput) -> dict[str, Any]:
        loaded = candidate.loaded
        known = environment(self.device)
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
    """Check models and tasks for judging them side by side: the same rows for all. See `evaluate`, also for errors."""
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
            "a loaded model is judged as it is: leave dtype and device at 'auto', or convert it before"
        )
    place = choose_device(device, loaded)
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    names = [name.strip() for name in names if name.strip()]
    candidates = tuple(resolve_model_input(model, tokenizer, trust_remote_code) for model in models)
    return TaskRun(
        candidates=candidates,
        tasks=tuple(load_tasks(names, fewshot, limit, data_folder(data_dir))),
        batch=_CPU_BATCH if batch == "auto" and place.type == "cpu" else batch,
        dtype=dtype,
        device=place,
        cache=None if cache is None else ResultCache(cache),
        trust_remote_code=trust_remote_code,
    )


def _to_json(score: TaskScore) -> dict[str, Any]:
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
