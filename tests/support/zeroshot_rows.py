"""A few made-up rows of every zero-shot task: as on the hub, and as in local datasets."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
#: The definitions of tasks whose rows are in a local folder.
LOCAL = Path(__file__).resolve().parents[2] / "examples/tasks"

_WORDS = ("amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath")


def _choices(n: int, numbered: bool) -> Row:
    labels = ["1", "2", "3", "4"] if numbered else ["A", "B", "C", "D"]
    return {
        "choices": {"text": [f"{_WORDS[(n + i) % 8]} {i}" for i in range(4)], "label": labels},
        "answerKey": labels[n % 4],
    }


def _arc(n: int) -> Row:
    # Some ARC questions number their choices instead of lettering them.
    return {
        "id": f"A{n}",
        "question": f"What grows in {n} years?",
        **_choices(n, numbered=n % 3 == 2),
    }


#: Task -> its row with a number, as on the hub.
_MAKERS: dict[str, Callable[[int], Row]] = {
    "boolq": lambda n: {
        "question": f"is {_WORDS[n % 8]} older than stone",
        "passage": f"Stone -- {_WORDS[n % 8].capitalize()} is {n} ages old.\u2028It lasts.",
        "idx": n,
        "label": n % 2,
    },
    "rte": lambda n: {
        "sentence1": f"The {_WORDS[n % 8]} fell {n} days ago.",
        "sentence2": f"The {_WORDS[n % 8]} stands.",
        "label": (n + 1) % 2,
        "idx": n,
    },
    "hellaswag": lambda n: {
        "ind": n,
        "activity_label": "Wrapping gifts",
        "ctx_a": f"A man has {n} boxes [title] How to wrap them [step]",
        "ctx_b": "he takes  paper",
        "ctx": "not used by the prompt",
        "endings": [
            f"and {verb} the {_WORDS[n % 8]}."
            for verb in ("folds", "eats", "[substeps] burns", "is")
        ],
        "source_id": f"made~{n}",
        "split": "val",
        "split_type": "indomain",
        "label": str(n % 4),
    },
    "winogrande": lambda n: {
        "sentence": (
            f"The {_WORDS[n % 8]} did not fit in the chest because the _ was too big for {n} men."
        ),
        "option1": _WORDS[n % 8],
        "option2": "chest",
        "answer": str(1 + n % 2),
    },
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": lambda n: {
        "id": f"O{n}",
        "question_stem": f"After {n} rains there is",
        **_choices(n, numbered=False),
    },
    "lambada_openai": lambda n: {
        "text": f"She looked {n} times, and again, for her lost {_WORDS[n % 8]}"
    },
}
TASKS = tuple(_MAKERS)
#: The split that each task scores, by its name on the hub.
SPLIT = {
    task: "test" if task.startswith(("arc", "open", "lam")) else "validation" for task in TASKS
}
_STEM = {"winogrande": "winogrande_xl"}


def upstream(task: str, count: int = 6, first: int = 0) -> list[Row]:
    return [_MAKERS[task](n) for n in range(first, first + count)]


def reduced(task: str, row: Row) -> Row:
    """A row as a local folder has it.

    Choices are a list with the index of the correct one, and LAMBADA's last word is separate.
    """
    if task.startswith(("arc", "openbookqa")):
        gold = row["choices"]["label"].index(row["answerKey"].strip())
        question = row["question" if "question" in row else "question_stem"]
        return {
            "id": row["id"],
            "question": question,
            "choices": row["choices"]["text"],
            "gold": gold,
        }
    if task == "lambada_openai":
        context, _, last = row["text"].rpartition(" ")
        return {"context": context, "continuation": last}
    return row


def write_split(data: Path, task: str, split: str, rows: list[Row]) -> Path:
    """Write one file of local datasets. HellaSwag's is compressed, to cover that as well."""
    folder = data / "zeroshot"
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = folder / f"{_STEM.get(task, task)}_{split}.jsonl"
    if task == "hellaswag":
        path = path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def write_local_datasets(data: Path, count: int = 6) -> Path:
    for task in TASKS:
        write_split(data, task, SPLIT[task], [reduced(task, row) for row in upstream(task, count)])
    return data
