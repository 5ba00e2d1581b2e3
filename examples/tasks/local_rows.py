"""Rows of tasks from a folder of one's own, for the YAML files beside this one.

    PRUNUS_DATA=DIR prunus eval MODEL --tasks paper7 --include-path examples/tasks
    PRUNUS_DATA=DIR lm_eval --model hf --tasks boolq,rte --include_path examples/tasks …

A split is DIR/zeroshot/<name>_<split>.jsonl, or .jsonl.gz, with one JSON object per line and the
columns of the hub. Files of ARC, OpenBookQA and LAMBADA may have a short form, whose rows get
their upstream columns back.
"""

import gzip
import json
import os
from pathlib import Path

import datasets


def read(name, scored, data=None, **_):
    """Split -> rows, as lm-eval's `custom_dataset` gives them.

    Args:
        name: The beginning of the names of the files.
        scored: The split whose file must exist. lm-eval opens the others even if it uses none of
            their rows, so they may be empty.
        data: The folder; None takes the one in PRUNUS_DATA.
    """
    folder = data or os.environ.get("PRUNUS_DATA")
    if not folder:
        raise FileNotFoundError("give the folder of the rows in PRUNUS_DATA")
    splits = {}
    for split in (scored, "train", "validation", "test"):
        paths = [Path(folder, "zeroshot", f"{name}_{split}.jsonl{end}") for end in ("", ".gz")]
        file = next(filter(Path.exists, paths), None)
        if file is not None:
            text = gzip.open(file).read() if file.suffix == ".gz" else file.read_bytes()
            lines = filter(bytes.strip, text.split(b"\n"))
            rows = [upstream(json.loads(line)) for line in lines]
            splits[split] = datasets.Dataset.from_list(rows)
        elif split == scored:
            raise FileNotFoundError(f"{paths[0]} does not exist")
        else:
            splits[split] = splits[scored].select([])
    return splits


def upstream(row):
    """A row with the columns that it has on the hub, also if it has the short form.

    Short rows have the choices as a list and the index of the right one, or LAMBADA's last word
    separately.

    >>> upstream({"question": "1 + 2?", "choices": ["3", "4"], "gold": 1})["answerKey"]
    'B'
    """
    if "continuation" in row:
        return {"text": f"{row['context']} {row['continuation']}"}
    if "gold" not in row:
        return row
    labels = list("ABCDEFGH"[: len(row["choices"])])
    return {
        "question": row["question"],
        "question_stem": row["question"],
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }
