"""Rows of benchmark datasets from a local folder, in the form that they have on the hub.

Each split of a dataset is a file `zeroshot/<name>_<split>.jsonl` (or `.jsonl.gz`) with one JSON
object per line. <name> is the name in the table below, or else the name of the task. Some files
leave out what no prompt needs. ARC and OpenBookQA have the choices as a list and the index of the
correct one, LAMBADA has the last word separately. Such rows get their upstream columns back.
Nothing else is done to any row, so the prompts are lm-eval's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.calibration.files import read_text
from prunus.calibration.hub import as_dataset

__all__ = ["FOLDER", "check_local_datasets", "fewshot_split", "load_splits", "read_rows"]

FOLDER = "zeroshot"
Row = dict[str, Any]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class _LocalDataset:
    """A dataset in the local folder.

    Attributes:
        name: its name in file names.
        columns: the columns that a row has on the hub and that prompts need.
        restore: a function from a row in the file to a row with these columns.
    """

    name: str
    columns: tuple[str, ...]
    restore: Callable[[Row], Row] = lambda row: row


def _restore_choices(row: Row) -> Row:
    """Turn a list of choices and the index `gold` into labelled choices and the correct label.

    >>> _restore_choices({"question": "2 + 2?", "choices": ["3", "4"], "gold": 1})
    {'question': '2 + 2?', 'choices': {'text': ['3', '4'], 'label': ['A', 'B']}, 'answerKey': 'B'}
    """
    if isinstance(row["choices"], dict):
        return row
    rest = {key: value for key, value in row.items() if key not in ("choices", "gold")}
    labels = list(_LETTERS[: len(row["choices"])])
    if not 0 <= row["gold"] < len(labels):
        raise ValueError(f"gold is {row['gold']}, but there are {len(labels)} choices")
    return rest | {
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


def _restore_openbookqa(row: Row) -> Row:
    row = _restore_choices(row)
    return {{"question": "question_stem"}.get(key, key): value for key, value in row.items()}


def _restore_lambada(row: Row) -> Row:
    if "text" in row:
        return row
    return {"text": f"{row['context']} {row['continuation']}"}


_ARC = ("id", "question", "choices", "answerKey")
#: (last part of the dataset's path on the hub, its configuration) -> the local dataset.
_DATASETS: dict[tuple[str, str | None], _LocalDataset] = {
    ("super_glue", "boolq"): _LocalDataset("boolq", ("question", "passage", "label")),
    ("glue", "rte"): _LocalDataset("rte", ("sentence1", "sentence2", "label")),
    ("hellaswag", None): _LocalDataset(
        "hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    ),
    ("winogrande", "winogrande_xl"): _LocalDataset(
        "winogrande_xl", ("sentence", "option1", "option2", "answer")
    ),
    ("ai2_arc", "ARC-Easy"): _LocalDataset("arc_easy", _ARC, _restore_choices),
    ("ai2_arc", "ARC-Challenge"): _LocalDataset("arc_challenge", _ARC, _restore_choices),
    ("openbookqa", "main"): _LocalDataset(
        "openbookqa", ("id", "question_stem", "choices", "answerKey"), _restore_openbookqa
    ),
    ("lambada_openai", "default"): _LocalDataset("lambada_openai", ("text",), _restore_lambada),
}


def check_local_datasets(
    folder: Path, configs: Mapping[str, Mapping[str, Any] | None], shots: int | None = None
) -> None:
    """Check that a local folder has every file that will be needed, before any is read.

    Args:
        folder: the folder that contains `zeroshot/`.
        configs: task -> its definition in lm-eval. None for a group, and for a task that is Python
            code.
        shots: worked examples per prompt; None takes the task's own number.

    Raises:
        ValueError: a local folder cannot provide the rows of a task.
        FileNotFoundError: files are missing; the message names all of them.
    """
    missing = []
    for task, config in configs.items():
        if config is None or "dataset_path" not in config:
            raise ValueError(
                f"{task} is not a single task with one dataset, so the data folder {folder} "
                "cannot give its rows; without a data folder (--data, PRUNUS_DATA) they come from "
                "the hub"
            )
        splits = {"the rows": _scored_split(config)}
        own_examples = "samples" in (config.get("fewshot_config") or {})
        if (config.get("num_fewshot") if shots is None else shots) and not own_examples:
            splits["the examples"] = fewshot_split(config)
        for what, split in splits.items():
            if _find_file(folder, task, config, split) is None:
                missing.append(
                    f"{FOLDER}/{_stem(task, config, split)}.jsonl ({split} split: {what} of {task})"
                )
    if missing:
        raise FileNotFoundError(
            f"the data folder {folder} lacks {', '.join(missing)}; no other split takes its place"
        )


def load_splits(folder: Path, task: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Load all splits of a task that lm-eval opens.

    lm-eval opens the split of the few-shot examples even for zero-shot prompts. If the local folder
    does not have this split, it is empty here. `check_local_datasets` has made sure that it is not
    used then.

    Returns:
        Split -> `datasets.Dataset`, and the name of the file with the rows that are scored.

    Raises:
        FileNotFoundError: the file with the rows that are scored is missing.
        ValueError: a row is damaged, see `read_rows`.
    """
    scored = _scored_split(config)
    named = [config.get(f"{kind}_split") for kind in ("test", "validation", "training", "fewshot")]
    splits = [split for split in (*named, fewshot_split(config)) if split]
    files = {split: _find_file(folder, task, config, split) for split in splits}
    file = files[scored]
    if file is None:
        raise FileNotFoundError(
            f"the data folder {folder} lacks {FOLDER}/{_stem(task, config, scored)}.jsonl"
        )
    on_hub = config["dataset_path"], config.get("dataset_name")
    found = {
        split: as_dataset(read_rows(path, *on_hub))
        for split, path in files.items()
        if path is not None
    }
    empty = found[scored].select([])
    return {split: found.get(split, empty) for split in splits}, f"{FOLDER}/{file.name}"


def fewshot_split(config: Mapping[str, Any]) -> str:
    """The split from which lm-eval draws examples.

    It is the split that the definition names, or else the first of training, validation and test.

    >>> fewshot_split({"training_split": None, "validation_split": "dev", "test_split": "test"})
    'dev'
    """
    named = (config.get("fewshot_config") or {}).get("split") or config.get("fewshot_split")
    rest = (config.get(f"{kind}_split") for kind in ("training", "validation", "test"))
    return str(named or next(split for split in rest if split))


def _scored_split(config: Mapping[str, Any]) -> str:
    """The split with the rows that are scored: test, or validation if there is no test split."""
    return str(config.get("test_split") or config["validation_split"])


def _stem(task: str, config: Mapping[str, Any], split: str) -> str:
    """The file name of a split, without its suffix."""
    known = _local_dataset(config["dataset_path"], config.get("dataset_name"))
    return f"{task if known is None else known.name}_{split}"


def _find_file(folder: Path, task: str, config: Mapping[str, Any], split: str) -> Path | None:
    stem = _stem(task, config, split)
    paths = [folder / FOLDER / f"{stem}{suffix}" for suffix in (".jsonl", ".jsonl.gz")]
    return next((path for path in paths if path.is_file()), None)


def read_rows(file: Path, path: str, configuration: str | None) -> list[Row]:
    """The rows of one file in upstream form, in the order of the file.

    Args:
        file: a `.jsonl` or `.jsonl.gz` file.
        path: path of the dataset on the hub.
        configuration: name of its configuration on the hub, or None.

    Raises:
        ValueError: a line is no JSON object or lacks a column, or there are no rows. The message
            names file and line.
    """
    known = _local_dataset(path, configuration)
    rows = []
    # str.splitlines would also split at U+2028 and other characters that JSON strings may contain.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            if known is not None:
                row = known.restore(row)
                absent = [column for column in known.columns if column not in row]
                if absent:
                    raise KeyError(absent[0])
        except KeyError as fault:
            raise ValueError(
                f"{file}, line {number}: no column {fault.args[0]!r}; it has {', '.join(row)}"
            ) from fault
        except (ValueError, TypeError, AttributeError, RecursionError) as fault:
            raise ValueError(f"{file}, line {number}: {fault}") from fault
        rows.append(row)
    if not rows:
        raise ValueError(f"{file}: there are no rows in this file")
    return rows


def _local_dataset(path: str, configuration: str | None) -> _LocalDataset | None:
    return _DATASETS.get((path.rpartition("/")[2], configuration))
