"""Text and token ids from files: plain text, JSON lines, safetensors.

A file of a user may be damaged, or made to do harm. So nothing in it is executed, a compressed file
is given up once it becomes far larger than text does, and every error names the file.
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import torch

from prunus.words import reason

# A compressed file may always hold this many bytes of text.
_SMALL_TEXT = 2**26
# A larger text may have this many times the size of its compressed file.
_MAX_RATIO = 64
_PIECE = 2**20  # bytes to decompress at a time

#: How the names of files of text or token ids may end.
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json.gz", ".safetensors")


def file_kind(path: Path) -> str:
    """What a file holds, by its name: `text`, `json` or `safetensors`.

    `.json.gz` counts as JSON lines, because the shards of C4 are called so.

    Raises:
        ValueError: The name has none of the `SUFFIXES`.

    >>> file_kind(Path("c4-train.00000-of-01024.json.gz"))
    'json'
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise ValueError(
            f"{path}: cannot tell what this file holds; its name must end in {', '.join(SUFFIXES)}"
        )
    suffix = Path(name.removesuffix(".gz")).suffix[1:]
    return {"txt": "text", "jsonl": "json"}.get(suffix, suffix)


def check_file(path: Path) -> None:
    """Check that `path` is a non-empty file of one of the kinds here. Opens nothing.

    Raises:
        ValueError: The name does not say what the file holds, or the file is empty.
        FileNotFoundError: There is no such file.
    """
    file_kind(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, without empty ones.

    A `.txt` file is one document. In the other formats every line is one.

    Raises:
        ValueError, FileNotFoundError: As `check_file`. ValueError also where the file is damaged,
            holds no text, or grows too much when it is decompressed.
    """
    check_file(path)
    match file_kind(path):
        case "text":
            documents = [read_text(path)]
        case "json":
            documents = read_json_lines(path)
        case _:
            raise ValueError(f"{path}: holds token ids, not text; give a text file")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{path}: there is no text in this file")
    return documents


def read_text(path: Path) -> str:
    """The whole of a text file, decompressed if its name ends in `.gz`. Keeps line ends.

    Raises:
        ValueError: The file is damaged or not UTF-8, or grows too much when it is decompressed.
    """
    try:
        data = _decompress(path) if path.name.lower().endswith(".gz") else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated gzip file ({error})") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def _decompress(path: Path) -> bytes:
    """The content of a gzip file, read piece by piece so that its size is known in time.

    Text becomes about three times smaller, and rarely more than ten times. A file that grows by
    thousands was made to fill the memory of whoever reads it.
    """
    compressed = path.stat().st_size
    largest = max(_SMALL_TEXT, _MAX_RATIO * compressed)
    pieces = []
    total = 0
    with gzip.open(path) as file:
        while piece := file.read(_PIECE):
            pieces.append(piece)
            total += len(piece)
            if total > largest:
                raise ValueError(
                    f"{path}: {compressed:,} bytes become more than {largest:,} bytes of text, "
                    "which no ordinary text does; decompress it yourself if you trust it"
                )
    return b"".join(pieces)


def read_json_rows(path: Path) -> dict[int, dict[str, Any]]:
    """Number of a line, from 1 -> its JSON object, without blank lines.

    Raises:
        ValueError: A line is not a JSON object (the message has its number), or as `read_text`.
    """
    rows = {}
    # Not splitlines: JSON strings may hold U+2028 and other characters that it treats as line ends.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: not a JSON object ({reason(error)})"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object")
        rows[number] = record
    return rows


def read_json_lines(path: Path, fields: tuple[str, ...] = ("text",)) -> list[str]:
    """One string per non-blank line: the values of `fields` of its JSON object, concatenated.

    Raises:
        ValueError: A line is not a JSON object with text in all fields (the message has its
            number), or as `read_text`.
    """
    documents = []
    for number, record in read_json_rows(path).items():
        values = [record.get(field) for field in fields]
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) < len(fields):
            names = " and ".join(repr(field) for field in fields)
            raise ValueError(f"{path}, line {number}: expected a JSON object with text in {names}")
        documents.append("".join(texts))
    return documents


def read_ids(path: Path) -> torch.Tensor:
    """The tensor `input_ids` of a safetensors file, (windows, tokens) int64.

    Raises:
        ValueError, FileNotFoundError: As `check_file`. ValueError also where the file is damaged
            or has no such tensor, and where the tensor is empty or does not hold token ids.
    """
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            names = list(file.keys())
            ids = file.get_tensor("input_ids") if "input_ids" in names else None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    if ids is None:
        raise ValueError(
            f"{path}: no tensor 'input_ids'; it holds {', '.join(sorted(names)) or 'nothing'}"
        )
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"{path}: input_ids must be integers of shape (windows, tokens), "
            f"not {ids.dtype} of shape {tuple(ids.shape)}"
        )
    if ids.numel() == 0:
        raise ValueError(f"{path}: input_ids is empty, shape {tuple(ids.shape)}")
    ids = ids.long()
    if ids.min() < 0:
        raise ValueError(f"{path}: input_ids holds the negative id {int(ids.min())}")
    return ids
