"""The named corpora: c4, wikitext2, ptb from the hub or from a data folder, python-docs from Python itself.

Each has two parts that share no text: `calibration`, from which windows are drawn, and `scoring`, on which
perplexity is measured. Where a data folder is given, everything comes from it and the hub is never asked.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prunus.calibration.files import read_json_lines, read_text, require
from prunus.calibration.hub import load_column

Part = Literal["calibration", "scoring"]


@dataclass(frozen=True)
class Corpus:
    """Documents (or lines, or sentences: as the corpus has them), what joins them, where they are from."""

    documents: Sequence[str]
    joiner: str
    source: str

    def text(self) -> str:
        """All documents as one string."""
        return self.joiner.join(self.documents)


@dataclass(frozen=True)
class _MirrorFile:
    path: str  # below the data folder
    note: str = ""  # what a reader of a number has to know about this file
    fields: tuple[str, ...] = ("text",)  # of a JSON line


@dataclass(frozen=True)
class _Place:
    known_as: str
    hub: dict[str, Any]  # keyword arguments of datasets.load_dataset, but for the split
    split: str
    mirror: tuple[_MirrorFile, ...]  # the original file first, then what may stand in for it


_WIKITEXT2 = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
# That repository is a loading script, which `datasets` no longer runs; the hub keeps a Parquet copy too.
_PTB = {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"}
_C4_TRAIN, _C4_VALIDATION = (
    "c4-train.00000-of-01024.json.gz",
    "c4-validation.00000-of-00008.json.gz",
)

_PLACES: dict[tuple[str, Part], _Place] = {
    ("c4", "calibration"): _Place(
        known_as="allenai/c4, en, train shard 0",
        hub={"path": "allenai/c4", "data_files": {"train": f"en/{_C4_TRAIN}"}},
        split="train",
        mirror=(
            _MirrorFile(f"c4/{_C4_TRAIN}"),
            _MirrorFile(
                "c4/c4_en_train_shard0_first1000.jsonl.gz",
                "the first 1,000 documents of train shard 0",
            ),
        ),
    ),
    ("c4", "scoring"): _Place(
        known_as="allenai/c4, en, validation shard 0",
        hub={"path": "allenai/c4", "data_files": {"validation": f"en/{_C4_VALIDATION}"}},
        split="validation",
        mirror=(
            _MirrorFile(f"c4/{_C4_VALIDATION}"),
            _MirrorFile(
                "c4/c4_en_1480_prefix_completion.jsonl.gz",
                "truncated passages, not the validation shard that papers score",
                ("prefix", "gold_completion"),
            ),
        ),
    ),
    ("wikitext2", "calibration"): _Place(
        known_as="wikitext-2-raw-v1, train",
        hub=_WIKITEXT2,
        split="train",
        mirror=(
            _MirrorFile("wikitext2/wiki.train.raw"),
            _MirrorFile(
                "wikitext2/train_unk_shuffled_articles.txt.gz",
                "train text in its <unk> form, articles in shuffled order, not the raw text",
            ),
        ),
    ),
    ("wikitext2", "scoring"): _Place(
        known_as="wikitext-2-raw-v1, test",
        hub=_WIKITEXT2,
        split="test",
        mirror=(_MirrorFile("wikitext2/wiki.test.raw"),),
    ),
    ("ptb", "calibration"): _Place(
        known_as="ptb_text_only, train",
        hub=_PTB,
        split="train",
        mirror=(_MirrorFile("ptb/ptb.train.txt"),),
    ),
    ("ptb", "scoring"): _Place(
        known_as="ptb_text_only, test",
        hub=_PTB,
        split="test",
        mirror=(_MirrorFile("ptb/ptb.test.txt"),),
    ),
}

_COLUMN = {"c4": "text", "wikitext2": "text", "ptb": "sentence"}
_JOINER = {
    "c4": " ",
    "wikitext2": "\n\n",
    "ptb": " ",
    "python-docs": "\n\n",
}  # as SparseGPT and Wanda join them

NAMES = ("c4", "wikitext2", "ptb", "python-docs")


def data_folder(data_dir: Path | None) -> Path | None:
    """`data_dir`, or else the folder in the environment variable PRUNUS_DATA, or None. Must exist."""
    if data_dir is None and not os.environ.get("PRUNUS_DATA"):
        return None
    folder = Path(data_dir if data_dir is not None else os.environ["PRUNUS_DATA"])
    if not folder.is_dir():
        origin = "the data folder" if data_dir is not None else "the data folder in PRUNUS_DATA"
        raise FileNotFoundError(f"{folder}: {origin} does not exist")
    return folder


def check_corpus(name: str, part: Part, data_dir: Path | None) -> None:
    """Raise unless `load_corpus` has what it needs here: the file, the library. Asks no network."""
    if name == "python-docs":
        if importlib.util.find_spec("pydoc_data") is None:
            raise ModuleNotFoundError(
                "this Python comes without pydoc_data, which python-docs is made of"
            )
    elif _mirror_file(name, part, data_dir) is None:
        require("datasets", f"loading {name} from the hub")


def load_corpus(name: str, part: Part, data_dir: Path | None) -> Corpus:
    """The documents of one part of a corpus of `NAMES`.

    Raises FileNotFoundError naming the file that a data folder lacks, ModuleNotFoundError naming the extra,
    OSError where the hub does not answer.
    """
    check_corpus(name, part, data_dir)
    if name == "python-docs":
        source = f"python-docs ({part} half of pydoc_data.topics, repeated paragraphs dropped)"
        return Corpus(python_docs(part), _JOINER[name], source)
    place = _PLACES[name, part]
    mirror = _mirror_file(name, part, data_dir)
    if mirror is None:
        documents = load_column(name, place.hub, place.split, _COLUMN[name], place.mirror[0].path)
        return Corpus(documents, _JOINER[name], f"{name} ({place.known_as}, from the hub)")
    folder = data_folder(data_dir)
    assert folder is not None
    path = folder / mirror.path
    if ".json" in path.name:
        documents = read_json_lines(path, mirror.fields)
    elif name == "wikitext2":
        documents = wikitext_lines(read_text(path))
    else:
        documents = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    note = f": {mirror.note}" if mirror.note else ""
    return Corpus(documents, _JOINER[name], f"{name} ({mirror.path}{note})")


def _mirror_file(name: str, part: Part, data_dir: Path | None) -> _MirrorFile | None:
    """The file of the data folder to read, None where there is no data folder."""
    folder = data_folder(data_dir)
    if folder is None:
        return None
    candidates = _PLACES[name, part].mirror
    for mirror in candidates:
        if (folder / mirror.path).is_file():
            return mirror
    wanted = " or ".join(mirror.path for mirror in candidates)
    raise FileNotFoundError(
        f"{folder}: {name} for {part} needs {wanted} in this data folder, which is not there"
    )


def wikitext_lines(raw: str) -> list[str]:
    """The lines of a WikiText-2 raw file as the data set on the hub has them.

    A blank line (in the file: one space) becomes the empty string, any other keeps its newline. Joined with
    two newlines they are the text whose perplexity papers report.
    """
    lines = raw.removesuffix("\n").split("\n")
    return [line + "\n" if line.strip() else "" for line in lines]


def python_docs(part: Part) -> list[str]:
    """Paragraphs of the English documentation that ships with Python: one of two halves that share none.

    Topics in sorted order; a paragraph met before (many sections are in several topics) is dropped, for
    text seen in calibration must not be scored; the rest is cut where half of the characters are reached.
    """
    from pydoc_data.topics import topics

    paragraphs = []
    seen = set()
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            bare = " ".join(paragraph.split())
            if bare and bare not in seen:
                seen.add(bare)
                paragraphs.append(paragraph)
    half = sum(map(len, paragraphs)) / 2
    characters = 0
    for cut, paragraph in enumerate(paragraphs):
        characters += len(paragraph)
        if characters >= half:
            return paragraphs[: cut + 1] if part == "calibration" else paragraphs[cut + 1 :]
    raise ValueError(
        "pydoc_data.topics holds no text in this Python, so python-docs is not available"
    )
