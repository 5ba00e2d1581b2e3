"""Rows of tasks from a local folder, read by the JSON reader of `datasets`.

A split is a file `zeroshot/<task>_<split>.jsonl` (or `.jsonl.gz`) with one JSON object per line, as
on the hub. Nothing is done to these rows, so the prompts are lm-eval's own. Files of ARC,
OpenBookQA and LAMBADA may also have a short form, whose rows get their upstream columns back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.calibration.corpora import json_rows

FOLDER = "zeroshot"
#: Task -> its name in file names, where that is another one.
_NAMES = {"winogrande": "winogrande_xl"}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def local_files(
    folder: Path, configs: Mapping[str, Mapping[str, Any] | None], shots: int | None = None
) -> dict[str, dict[str, Path | None]]:
    """Find the files of all tasks, before any is read.

    Args:
        configs: task -> its definition in lm-eval. None for a group, and for a task that is Python
            code.
        shots: worked examples per prompt; None takes the task's own number.

    Returns:
        Task -> split -> file. The split that is scored comes first. lm-eval opens that of the
        examples even for prompts without any, so the file of a split that is not used may be None.
    """
    found, missing = {}, []
    for task, config in configs.items():
        if config is None or "dataset_path" not in config:
            raise ValueError(
                f"{task} is not a single task with one dataset, so the data folder {folder} "
                "cannot give its rows; without a data folder (PRUNUS_DATA) they are downloaded"
            )
        # The split with the rows that are scored is test, or validation if there is no test split.
        scored = str(config.get("test_split") or config["validation_split"])
        examples = fewshot_split(config)
        found[task] = {split: _find_file(folder, task, split) for split in (scored, examples)}
        needed = {scored: "rows"}
        own_examples = "samples" in (config.get("fewshot_config") or {})
        if (config.get("num_fewshot") if shots is None else shots) and not own_examples:
            needed = {examples: "examples"} | needed
        missing += [
            f"{FOLDER}/{_NAMES.get(task, task)}_{split}.jsonl (the {what} of {task})"
            for split, what in needed.items()
            if found[task][split] is None
        ]
    if missing:
        raise FileNotFoundError(
            f"the data folder {folder} lacks {', '.join(missing)}; no other split takes its place"
        )
    return found


def _find_file(folder: Path, task: str, split: str) -> Path | None:
    stem = folder / FOLDER / f"{_NAMES.get(task, task)}_{split}"
    paths = [Path(f"{stem}{suffix}") for suffix in (".jsonl", ".jsonl.gz")]
    return next((path for path in paths if path.is_file()), None)


def fewshot_split(config: Mapping[str, Any]) -> str:
    """The split from which lm-eval draws examples.

    It is the split that the definition names, or else the first of training, validation and test.

    >>> fewshot_split({"training_split": None, "validation_split": "dev", "test_split": "test"})
    'dev'
    """
    named = (config.get("fewshot_config") or {}).get("split") or config.get("fewshot_split")
    rest = (config.get(f"{kind}_split") for kind in ("training", "validation", "test"))
    return str(named or next(split for split in rest if split))


def load_splits(task: str, files: Mapping[str, Path | None]) -> dict[str, Any]:
    """Split -> `datasets.Dataset`. A split without a file is empty; damaged rows are an error."""
    found = {split: _read_rows(task, file) for split, file in files.items() if file is not None}
    empty = next(iter(found.values())).select([])
    return {split: found.get(split, empty) for split in files}


def _read_rows(task: str, file: Path) -> Any:
    try:
        docs = json_rows(file)
        for column in docs.column_names:
            # A prompt would show "None" without a word.
            if docs.data.column(column).null_count:
                row = next(i for i, value in enumerate(docs[column]) if value is None)
                raise ValueError(f"row {row} has no value for {column!r}")
        return _upstream(task, docs)
    except Exception as fault:  # datasets raises errors of many kinds
        cause: BaseException = fault
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(
            f"{file}: the rows could not be read ({type(cause).__name__}: {str(cause)[:300]})"
        ) from fault


def _upstream(task: str, docs: Any) -> Any:
    """Give rows in the short form the columns that they have on the hub; leave others as they are.

    Short rows have the choices as a list and the index of the right one, or LAMBADA's last word
    separately.
    """
    in_memory = {"load_from_cache_file": False, "keep_in_memory": True}
    if "continuation" in docs.column_names:
        return docs.map(_whole_text, remove_columns=docs.column_names, **in_memory)
    if "gold" not in docs.column_names:
        return docs
    if task == "openbookqa":
        docs = docs.rename_column("question", "question_stem")
    return docs.map(_labelled_choices, remove_columns=["choices", "gold"], **in_memory)


def _whole_text(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": f"{row['context']} {row['continuation']}"}


def _labelled_choices(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a list of choices and the index `gold` into labelled choices and the correct label.

    >>> _labelled_choices({"choices": ["3", "4"], "gold": 1})
    {'choices': {'text': ['3', '4'], 'label': ['A', 'B']}, 'answerKey': 'B'}
    """
    labels = list(_LETTERS[: len(row["choices"])])
    if not 0 <= row["gold"] < len(labels):
        raise ValueError(f"gold is {row['gold']}, but there are {len(labels)} choices")
    return {
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }
