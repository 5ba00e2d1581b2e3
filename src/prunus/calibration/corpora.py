"""The named corpora: c4, wikitext2 and ptb from the hub or local datasets, and those of Python.

Each corpus has two parts that share no text: `calibration`, from which windows are drawn, and
`scoring`, on which perplexity is measured. If a data folder with local datasets is given, all text
comes from it, and the hub is never asked.

The order of this file: where each part is read, the checks before a run, the text itself, and the
library `datasets`.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import sysconfig
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from prunus.calibration.draw import Text
from prunus.calibration.files import read_json_lines, read_text
from prunus.hardware.process_state import replaced
from prunus.model.checkpoint.hub import no_answer
from prunus.words import reason, require_library

#: The part of a corpus: to draw windows from, or to measure perplexity on.
Part = Literal["calibration", "scoring"]


@dataclass(frozen=True)
class _LocalFile:
    """A file of local datasets."""

    path: str  #: below the data folder
    note: str = ""  #: how its text differs from the original, for the reader of a result
    fields: tuple[str, ...] = ("text",)  #: fields of a JSON line that make up a document


@dataclass(frozen=True)
class _Origin:
    """Where one part of a corpus is read."""

    hub_name: str  #: what people call it
    hub: dict[str, Any]  #: arguments of `datasets.load_dataset`, apart from the split
    split: str  #: the split of the data set
    #: files of local datasets: the original first, then those that are read in its place.
    local: tuple[_LocalFile, ...]
    joiner: str = " "  #: what the code of SparseGPT and Wanda puts between two documents or lines
    column: str = "text"  #: the column of the data set that holds the text


_WIKITEXT2 = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
# The repository is a loading script, which `datasets` no longer runs; the hub has a Parquet copy.
_PTB = {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"}
# Names of files of C4, on the hub and in a data folder.
_C4_TRAIN = "c4-train.00000-of-01024.json.gz"
_C4_VALIDATION = "c4-validation.00000-of-00008.json.gz"

# Corpus and part -> where its text is read. The corpora of Python need no entry.
_ORIGINS: dict[tuple[str, Part], _Origin] = {
    ("c4", "calibration"): _Origin(
        "allenai/c4, en, train shard 0",
        {"path": "allenai/c4", "data_files": {"train": f"en/{_C4_TRAIN}"}},
        "train",
        (
            _LocalFile(f"c4/{_C4_TRAIN}"),
            _LocalFile(
                "c4/c4_en_train_shard0_first1000.jsonl.gz",
                "the first 1,000 documents of train shard 0",
            ),
        ),
    ),
    ("c4", "scoring"): _Origin(
        "allenai/c4, en, validation shard 0",
        {"path": "allenai/c4", "data_files": {"validation": f"en/{_C4_VALIDATION}"}},
        "validation",
        (
            _LocalFile(f"c4/{_C4_VALIDATION}"),
            _LocalFile(
                "c4/c4_en_1480_prefix_completion.jsonl.gz",
                "truncated passages, not the validation shard that papers score",
                ("prefix", "gold_completion"),
            ),
        ),
    ),
    ("wikitext2", "calibration"): _Origin(
        "wikitext-2-raw-v1, train",
        _WIKITEXT2,
        "train",
        (
            _LocalFile("wikitext2/wiki.train.raw"),
            _LocalFile(
                "wikitext2/train_unk_shuffled_articles.txt.gz",
                "train text in its <unk> form, articles in shuffled order, not the raw text",
            ),
        ),
    ),
    ("wikitext2", "scoring"): _Origin(
        "wikitext-2-raw-v1, test",
        _WIKITEXT2,
        "test",
        (_LocalFile("wikitext2/wiki.test.raw"),),
        joiner="\n\n",
    ),
    ("ptb", "calibration"): _Origin(
        "ptb_text_only, train", _PTB, "train", (_LocalFile("ptb/ptb.train.txt"),), column="sentence"
    ),
    ("ptb", "scoring"): _Origin(
        "ptb_text_only, test", _PTB, "test", (_LocalFile("ptb/ptb.test.txt"),), column="sentence"
    ),
}

#: Sources that are read from a folder of local datasets, or from the hub.
LOCAL_SOURCES = ("c4", "wikitext2", "ptb", "mix")

#: The modules of Python's standard library to score on. The other ones are for calibration.
_SCORED_MODULES = {
    "argparse", "configparser", "csv", "difflib", "fractions", "heapq", "shelve", "statistics",
    "textwrap", "zipfile",
}  # fmt: skip
# Tests, tables, and packages that some systems install apart from Python.
_NO_CODE = {
    "test", "tests", "encodings", "pydoc_data", "_casefix.py", "_opcode_metadata.py", "entities.py",
    "distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo",
}  # fmt: skip
# Bytes. Smaller modules do little but import others.
_SMALLEST_MODULE = 4_000


def data_folder(data_dir: Path | None) -> Path | None:
    """The folder of local datasets: `data_dir`, the folder in PRUNUS_DATA, or None without both.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    origin = "the data folder" if data_dir is not None else "the data folder in PRUNUS_DATA"
    named = data_dir if data_dir is not None else os.environ.get("PRUNUS_DATA")
    if not named:
        return None
    if not (folder := Path(named)).is_dir():
        raise FileNotFoundError(
            f"{folder}: {origin} does not exist; correct the path, or leave it out to use the hub"
        )
    return folder


def check_corpus(name: str, part: Part, data_dir: Path | None) -> None:
    """Check that `load_corpus` has the file or the library that it needs. Asks no network.

    Args:
        name: One of `CORPORA`.
        part: The part that will be loaded.
        data_dir: As for `data_folder`.

    Raises:
        FileNotFoundError: The data folder, or the file in it, does not exist.
        ModuleNotFoundError: A library is not installed, or this Python comes without the text.
    """
    missing = ""
    if name == "python-docs" and importlib.util.find_spec("pydoc_data") is None:
        missing = "pydoc_data"
    elif name == "python-code" and not _library_modules(part):
        missing = "the source code of its standard library"
    elif name in LOCAL_SOURCES and _local_file(name, part, data_dir) is None:
        require_library("datasets", f"loading {name} from the hub", "data")
    if missing:
        raise ModuleNotFoundError(
            f"this Python comes without {missing}, the text of {name}; choose another source"
        )


def load_corpus(name: str, part: Part, data_dir: Path | None) -> Text:
    """The text of one part of a corpus. As in the papers, WikiText-2 and PTB are one text each.

    Args:
        name: One of `CORPORA`.
        part: The part to load.
        data_dir: As for `data_folder`.

    Raises:
        FileNotFoundError, ModuleNotFoundError: As `check_corpus`.
        ValueError: A local file is damaged.
        OSError: The hub cannot be reached, and nothing was downloaded earlier.
    """
    check_corpus(name, part, data_dir)
    if name == "python-docs":
        source = f"python-docs ({part} half of pydoc_data.topics, repeated paragraphs dropped)"
        return Text(python_docs(part), "\n\n", source)
    if name == "python-code":
        modules = python_code(part)
        source = f"python-code ({len(modules)} modules of Python {platform.python_version()})"
        return Text(modules, "\n\n", source, by_document=True, joins_short=True)
    origin = _ORIGINS[name, part]
    path_and_file = _local_file(name, part, data_dir)
    if path_and_file is None:
        documents = _from_hub(name, origin)
        described = f"{origin.hub_name}, from the hub"
    else:
        path, local = path_and_file
        described = f"{local.path}: {local.note}" if local.note else local.path
        if ".json" in path.name:
            documents = read_json_lines(path, local.fields)
        elif name == "wikitext2":
            documents = wikitext_lines(read_text(path))
        else:
            documents = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    return Text(documents, origin.joiner, f"{name} ({described})", by_document=name == "c4")


def _local_file(name: str, part: Part, data_dir: Path | None) -> tuple[Path, _LocalFile] | None:
    """The file of the data folder to read, with its path; None if there is no data folder."""
    folder = data_folder(data_dir)
    if folder is None:
        return None
    candidates = _ORIGINS[name, part].local
    for local in candidates:
        if (path := folder / local.path).is_file():
            return path, local
    names = " or ".join(local.path for local in candidates)
    raise FileNotFoundError(
        f"{folder}: {name} for {part} needs {names} in this data folder, which is not there"
    )


def wikitext_lines(raw: str) -> list[str]:
    """The lines of a raw WikiText-2 file as the data set on the hub has them.

    A blank line (in the file: one space) becomes the empty string, and any other line keeps its
    newline. Joined with two newlines, the lines of the test file are the text whose perplexity
    papers report.

    >>> wikitext_lines(" \\n = Title = \\n One line .\\n")
    ['', ' = Title = \\n', ' One line .\\n']
    """
    lines = raw.removesuffix("\n").split("\n")
    return [line + "\n" if line.strip() else "" for line in lines]


def python_docs(part: Part) -> list[str]:
    """Paragraphs of the documentation that ships with Python: one of two halves.

    Many sections belong to several topics. A repeated paragraph is dropped, because text seen in
    calibration must not be scored. Topics are sorted; the first half ends with the paragraph that
    reaches half of all characters.
    """
    from pydoc_data.topics import topics

    # The words of a paragraph -> the first paragraph with these words.
    by_words: dict[str, str] = {}
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            by_words.setdefault(" ".join(paragraph.split()), paragraph)
    paragraphs = [paragraph for words, paragraph in by_words.items() if words]
    # The number of characters up to the end of each paragraph.
    ends = list(accumulate(map(len, paragraphs)))
    cut = bisect_left(ends, ends[-1] / 2) + 1
    return paragraphs[:cut] if part == "calibration" else paragraphs[cut:]


def python_code(part: Part) -> list[str]:
    """The source code of the modules in one part of Python's standard library.

    The modules of `_SCORED_MODULES` are for scoring, and the others are for calibration.
    """
    # As text, so that it has the same line ends on every system.
    return [path.read_text(encoding="utf-8") for path in _library_modules(part)]


def _library_modules(part: Part) -> list[Path]:
    """The files of the modules, in a fixed order; none if the library is a zip file."""
    library = Path(sysconfig.get_path("stdlib"))
    files = []
    for name in sys.stdlib_module_names:
        if (name in _SCORED_MODULES) == (part == "scoring"):
            for path in (library / f"{name}.py", *(library / name).rglob("*.py")):
                is_code = not _NO_CODE.intersection(path.relative_to(library).parts)
                if is_code and path.is_file() and path.stat().st_size >= _SMALLEST_MODULE:
                    files.append(path)
    return sorted(files, key=Path.as_posix)


# --- the library `datasets`, which only this file uses ---


def _from_hub(name: str, origin: _Origin) -> Sequence[str]:
    """The documents of a data set on the hub; a row is read when it is indexed.

    Where the hub gives no answer, only what was downloaded earlier is used.
    """
    from datasets import config, load_dataset

    silent = no_answer()
    try:
        with replaced(config, "HF_HUB_OFFLINE", True) if silent else nullcontext():
            # The column is not a list: a shard of C4 never lies in memory as Python strings.
            column: Sequence[str] = load_dataset(**origin.hub, split=origin.split)[origin.column]
    except Exception as error:  # the library raises errors of many kinds: network, cache, its own
        cause = OSError(silent) if silent else error
        raise OSError(
            f"{name} could not be loaded from the hub ({reason(cause)}). These "
            "sources need no network: python-docs, python-code, a file of text, and a "
            f"data folder (`data` or PRUNUS_DATA) that holds {origin.local[0].path}"
        ) from cause
    return column


def dataset_of(rows: list[dict[str, Any]]) -> Any:
    """Rows, which have the same columns, as a `datasets.Dataset` in memory."""
    import datasets

    return datasets.Dataset.from_list(rows)
