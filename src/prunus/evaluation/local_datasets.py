"""Rows of benchmark data sets from a local folder, in the form that they have on the hub.

A split is a file `zeroshot/<name>_<split>.jsonl` (or `.jsonl.gz`), a JSON object per line. <name> is the data set's
where the table below knows it, and otherwise the task's. Some files leave out what no prompt needs: of ARC and
OpenBookQA they keep the choices as a list and the index of the right one, of LAMBADA the last word apart. Such
rows are given their upstream columns back, and nothing else is done to any row: prompts are lm-eval's own.
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
class _DataSet:
    """A data set of the mirror: its name in file names, its upstream columns, what brings them back."""

    name: str
    columns: tuple[str, ...]
    restore: Callable[[Row], Row] = lambda row: row


def _restore_choices(row: Row) -> Row:
    """choices as a list and gold as an index -> choices with labels and the label of the right one."""
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
#: (last part of the data set's path on the hub, its configuration) -> its place in a mirror.
_DATASETS: dict[tuple[str, str | None], _DataSet] = {
    ("super_glue", "boolq"): _DataSet("boolq", ("question", "passage", "label")),
    ("glue", "rte"): _DataSet("rte", ("sentence1", "sentence2", "label")),
    ("hellaswag", None): _DataSet(
        "hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    ),
    ("winogrande", "winogrande_xl"): _DataSet(
        "winogrande_xl", ("sentence", "option1", "option2", "answer")
    ),
    ("ai2_arc", "ARC-Easy"): _DataSet("arc_easy", _ARC, _restore_choices),
    ("ai2_arc", "ARC-Challenge"): _DataSet("arc_challenge", _ARC, _restore_choices),
    ("openbookqa", "main"): _DataSet(
        "openbookqa", ("id", "question_stem", "choices", "answerKey"), _restore_openbookqa
    ),
    ("lambada_openai", "default"): _DataSet("lambada_openai", ("text",), _restore_lambada),
}


def check_local_datasets(
    folder: Path, configs: Mapping[str, Mapping[str, Any] | None], shots: int | None = None
) -> None:
    """See that a mirror has every file that will be needed, before any is read.

    Args:
        folder: what holds `zeroshot/`.
        configs: task -> its definition by lm-eval, None for what is more than one task or more than a definition.
        shots: examples per prompt, None for the task's own number.

    Raises:
        ValueError: a task whose rows no mirror can give.
        FileNotFoundError: names all files that are not there.
    """
    lacking = []
    for task, config in configs.items():
        if config is None or "dataset_path" not in config:
            raise ValueError(
                f"{task} is not a single task with one data set, so the data folder {folder} cannot give its rows; "
                "without a data folder (--data, PRUNUS_DATA) they come from the hub"
            )
        splits = {"the rows": _scored_split(config)}
        own_examples = "samples" in (config.get("fewshot_config") or {})
        if (config.get("num_fewshot") if shots is None else shots) and not own_examples:
            splits["the examples"] = fewshot_split(config)
        for what, split in splits.items():
            if _find(folder, task, config, split) is None:
                lacking.append(
                    f"{FOLDER}/{_stem(task, config, split)}.jsonl ({split} split: {what} of {task})"
                )
    if lacking:
        raise FileNotFoundError(
            f"the data folder {folder} lacks {', '.join(lacking)}; no other split takes its place"
        )


def load_splits(folder: Path, task: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Split -> `datasets.Dataset` as lm-eval asks for them, and the file of the rows that are scored.

    lm-eval asks for the split of the examples even where it takes none from it: one that the mirror lacks is empty.
    `check_local_datasets` sees to it that none is missing that is used.
    """
    scored = _scored_split(config)
    named = [config.get(f"{kind}_split") for kind in ("test", "validation", "training", "fewshot")]
    splits = [split for split in (*named, fewshot_split(config)) if split]
    files = {split: _find(folder, task, config, split) for split in splits}
    file = files[scored]
    if file is None:
        raise FileNotFoundError(
            f"the data folder {folder} lacks {FOLDER}/{_stem(task, config, scored)}.jsonl"
        )
    place = config["dataset_path"], config.get("dataset_name")
    found = {
        split: as_dataset(read_rows(path, *place))
        for split, path in files.items()
        if path is not None
    }
    empty = found[scored].select([])
    return {split: found.get(split, empty) for split in splits}, f"{FOLDER}/{file.name}"


def fewshot_split(config: Mapping[str, Any]) -> str:
    """The split that lm-eval draws examples from: the one that is named, or else training, validation, test."""
    named = (config.get("fewshot_config") or {}).get("split") or config.get("fewshot_split")
    rest = (config.get(f"{kind}_split") for kind in ("training", "validation", "test"))
    return str(named or next(split for split in rest if split))


def _scored_split(config: Mapping[str, Any]) -> str:
    return str(config.get("test_split") or config["validation_split"])


def _stem(task: str, config: Mapping[str, Any], split: str) -> str:
    known = _dataset(config["dataset_path"], config.get("dataset_name"))
    return f"{task if known is None else known.name}_{split}"


def _find(folder: Path, task: str, config: Mapping[str, Any], split: str) -> Path | None:
    stem = _stem(task, config, split)
    candidates = [folder / FOLDER / f"{stem}{suffix}" for suffix in (".jsonl", ".jsonl.gz")]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def read_rows(file: Path, path: str, configuration: str | None) -> list[Row]:
    """The rows of one file in upstream form, in the order of the file.

    Raises:
        ValueError: a line is no JSON object or lacks a column, or there are no rows; names file and line.
    """
    known = _dataset(path, configuration)
    rows = []
    # Not splitlines: JSON strings may hold U+2028 and other characters that it takes for line ends.
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
        except (ValueError, TypeError) as fault:
            raise ValueError(f"{file}, line {number}: {fault}") from fault
        rows.append(row)
    if not rows:
        raise ValueError(f"{file}: there are no rows in this file")
    return rows


def _dataset(path: str, configuration: str | None) -> _DataSet | None:
    return _DATASETS.get((path.rpartition("/")[2], configuration))
