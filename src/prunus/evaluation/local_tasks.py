"""Rows of tasks from a local folder.

A split is a file `zeroshot/<task>_<split>.jsonl` (or `.jsonl.gz`) with one JSON object per line, as
on the hub. Nothing is done to these rows, so the prompts are lm-eval's own. Files of ARC,
OpenBookQA and LAMBADA may also have a short form, whose rows get their upstream columns back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from prunus.calibration.corpora import dataset_of
from prunus.calibration.files import read_json_rows
from prunus.words import reason

#: The folder inside the data folder that holds the files.
FOLDER = "zeroshot"
#: Task -> its name in file names, where that is another one.
_NAMES = {"winogrande": "winogrande_xl"}


def local_files(
    folder: Path, configs: Mapping[str, Mapping[str, Any] | None], shots: int | None = None
) -> dict[str, dict[str, Path | None]]:
    """Task -> split -> file, the split that is scored first; all are found before any is read.

    lm-eval opens the split of the examples even for prompts without any, so its file may be None.

    Args:
        folder: The data folder.
        configs: Task -> its definition in lm-eval; None for a group or a task of Python code.
        shots: Worked examples per prompt; None takes the number of the task.

    Raises:
        ValueError: A local folder cannot give the rows of a task.
        FileNotFoundError: Files are missing; the message names all of them.
    """
    files: dict[str, dict[str, Path | None]] = {}
    missing = []
    for task, config in configs.items():
        if config is None or "dataset_path" not in config:
            raise ValueError(
                f"{task} is not a single task with one dataset, so the data folder {folder} "
                "cannot give its rows; without a data folder (PRUNUS_DATA) they are downloaded"
            )
        # The split with the rows that are scored is test, or validation if there is no test split.
        scored = str(config.get("test_split") or config["validation_split"])
        # lm-eval draws examples from the split that is named, or the first of these.
        drawn = config.get("fewshot_config") or {}
        kinds = ("training_split", "validation_split", "test_split")
        first = next(split for kind in kinds if (split := config.get(kind)))
        examples = str(drawn.get("split") or config.get("fewshot_split") or first)
        stem = f"{FOLDER}/{_NAMES.get(task, task)}"
        for split in (scored, examples):
            paths = [folder / f"{stem}_{split}.jsonl{suffix}" for suffix in ("", ".gz")]
            file = next(filter(Path.is_file, paths), None)
            files.setdefault(task, {})[split] = file
        # The examples of some definitions are part of them ("samples").
        needed = {scored: "rows"}
        if (config.get("num_fewshot") if shots is None else shots) and "samples" not in drawn:
            needed = {examples: "examples"} | needed
        missing += [
            f"{stem}_{split}.jsonl (the {what} of {task})"
            for split, what in needed.items()
            if files[task][split] is None
        ]
    if missing:
        raise FileNotFoundError(
            f"the data folder {folder} lacks {', '.join(missing)}; no other split takes its place"
        )
    return files


def load_splits(task: str, files: Mapping[str, Path | None]) -> dict[str, Any]:
    """Split -> `datasets.Dataset`, from the files of `local_files`. Without a file it is empty.

    Raises:
        ValueError: Rows are damaged; the message names the file.
    """
    splits = {split: _read_rows(task, file) for split, file in files.items() if file is not None}
    empty = next(iter(splits.values())).select([])
    return {split: splits.get(split, empty) for split in files}


def _read_rows(task: str, file: Path) -> Any:
    """The rows of one file with their upstream columns, in the order of the file.

    Raises:
        ValueError: A line is no JSON object, a row lacks a column, or there are no rows.
    """
    lines = read_json_rows(file).values()
    try:
        rows = [_upstream(task, row) for row in lines]
        for column in dict.fromkeys(key for row in rows for key in row):
            for number, row in enumerate(rows):
                # A prompt would show "None" without a word.
                if row.get(column) is None:
                    raise ValueError(f"row {number} has no value for {column!r}")
        if not rows:
            raise ValueError("there are none")
        return dataset_of(rows)
    except (ValueError, TypeError, KeyError) as fault:
        raise ValueError(f"{file}: the rows could not be read ({reason(fault)})") from fault


def _upstream(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row with the columns that it has on the hub, also if it has the short form.

    Short rows have the choices as a list and the index of the right one, or LAMBADA's last word
    separately.

    >>> _upstream("arc_easy", {"question": "1 + 2?", "choices": ["3", "4"], "gold": 1})
    {'question': '1 + 2?', 'choices': {'text': ['3', '4'], 'label': ['A', 'B']}, 'answerKey': 'B'}
    """
    if "continuation" in row:
        return {"text": " ".join([row["context"], row["continuation"]])}
    if "gold" not in row:
        return row
    gold = row.pop("gold")
    labels = list(ascii_uppercase[: len(row.get("choices") or ())])
    if not 0 <= gold < len(labels):
        raise ValueError(f"gold is {gold}, but there are {len(labels)} choices")
    if task == "openbookqa":
        row["question_stem"] = row.pop("question", None)
    row["choices"] = {"text": row["choices"], "label": labels}
    return row | {"answerKey": labels[gold]}
