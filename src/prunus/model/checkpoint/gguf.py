"""GGUF import: one file of llama.cpp becomes a checkpoint folder that transformers can read.

Quantised tensors are unpacked. The result has the weights that llama.cpp computes with, not those
that the model had before it was quantised.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from prunus.model.checkpoint.atomic_files import (
    TEMPORARY_SUFFIX,
    fsync_folder,
    in_held,
    read_json,
    remove,
    remove_temporaries,
    write_json,
)
from prunus.model.checkpoint.gguf_header import check_header
from prunus.model.checkpoint.lock import LOCK_NAME, locked
from prunus.model.checkpoint.output_folder import is_vacant
from prunus.model.device import DTYPES
from prunus.model.kinds import CAUSAL
from prunus.model.meta_model import build_on_meta


def import_gguf(
    path: Path,
    dest: Path,
    *,
    overwrite: bool = False,
    dtype: str = "bfloat16",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write the model and tokenizer of a GGUF file to the folder `dest`.

    The files get their names when all of them are complete, and config.json last, so no loader
    takes a part for a model. With `overwrite`, `dest` holds the old content until then. The whole
    model is in memory for a while.

    Args:
        path: the GGUF file.
        dest: a folder that does not exist or is empty.
        overwrite: replace what `dest` holds.
        dtype: of the weights in the checkpoint, a name of `DTYPES`.
        progress: called with a line of text before each step.

    Returns:
        `architecture`, `parameters` (count), `tied` (whether head and embedding are one matrix),
        `dtype`, `files` (names), `bytes` (of all files), `chat_template` (whether there is one).

    Raises:
        ValueError: no GGUF file, a truncated one, or a model that transformers cannot import.
        FileNotFoundError: there is no such file.
        FileExistsError: `dest` holds something and `overwrite` is not set, or another run holds it.
        ModuleNotFoundError: the extra `gguf` is not installed.
    """
    path, dest = Path(path), Path(dest)
    _check_arguments(path, dest, overwrite=overwrite, dtype=dtype)
    say = progress or (lambda line: None)
    say(f"reading {path.name}")
    header = _read_header(path)
    with locked(dest):
        check_destination(dest, overwrite=overwrite)
        staging = in_held(dest / f"import{TEMPORARY_SUFFIX}")
        remove_temporaries(dest)
        staging.mkdir()
        try:
            say(f"unpacking {header['tensors']} tensors to {dtype}")
            with _without_progress_bars():
                summary = _convert(path, staging, DTYPES[dtype], header["weights"])
            _tidy(staging)
            say(f"writing {dest}")
            _put_in_place(staging, dest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    files = sorted(file for file in dest.iterdir() if file.is_file())
    return {
        "architecture": header["architecture"],
        **summary,
        "dtype": dtype,
        "files": [file.name for file in files],
        "bytes": sum(file.stat().st_size for file in files),
    }


def _check_arguments(path: Path, dest: Path, *, overwrite: bool, dtype: str) -> None:
    """Raise the errors of `import_gguf` that can be found before any work."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(sorted(DTYPES))}, not {dtype!r}")
    check_destination(dest, overwrite=overwrite)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path}: not a GGUF file; it starts with {magic!r} instead of b'GGUF'")
    check_extra()


def check_extra() -> None:
    """Raise ModuleNotFoundError unless the packages that the import needs are installed."""
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"importing a GGUF file needs {module}: pip install '.[gguf]'"
            )


def check_destination(dest: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError unless the folder `dest` is missing, vacant, or may be overwritten."""
    if not is_vacant(dest) and not overwrite:
        raise FileExistsError(
            f"{dest}: the folder is not empty; choose another one or give `overwrite`"
        )


def _read_header(path: Path) -> dict[str, Any]:
    """Architecture and number of tensors of a whole GGUF file: every tensor must lie inside it."""
    from gguf import GGUFReader

    header = check_header(path)
    try:
        GGUFReader(path)
        return header
    except Exception as error:  # the reader trusts its input and raises errors of many kinds
        raise ValueError(
            f"{path}: the GGUF file is truncated or damaged ({type(error).__name__}: {error}); "
            "fetch it again"
        ) from error


def _convert(path: Path, folder: Path, dtype: torch.dtype, weights: int) -> dict[str, Any]:
    """Let transformers read a GGUF file and save it to `folder`; returns figures of the model."""
    import transformers

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # Versions of transformers without GgufConfig unpack every GGUF file by default.
    config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": config(dequantize=True)} if config is not None else {}
    try:
        described = transformers.AutoConfig.from_pretrained(**source)
        _check_size(described, weights)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            **source, **unpack, dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        raise ValueError(
            f"{path}: transformers cannot import this file ({type(error).__name__}: {error})"
        ) from error
    # transformers would fill missing weights with random numbers.
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if loading.get(problem):
            names = sorted(str(key) for key in loading[problem])
            raise ValueError(
                f"{path}: transformers does not fully know this kind of model: "
                f"{problem.replace('_', ' ')} {', '.join(names[:5])}"
                f"{' ...' if len(names) > 5 else ''}"
            )
    tied = _tie_if_one_matrix(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tied": tied,
        "chat_template": tokenizer.chat_template is not None,
    }


@torch.no_grad()
def _tie_if_one_matrix(model: Any) -> bool:
    """Tie the head to the embedding if both hold one matrix. Returns whether they are tied now.

    Many GGUF files store the embedding of a tied model twice, the second time as the head and in
    more bits. The two then differ by errors of rounding, at most by a fifth (Q2_K); matrices that
    were trained apart differ by more than their own size. The head's form is kept, which is the
    more precise one.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is head or embedding.shape != head.shape:
        return embedding is head
    difference = size = 0.0
    for left, right in zip(embedding.split(4096), head.split(4096), strict=True):
        difference += float((left.float() - right.float()).square().sum())
        size += float(right.float().square().sum())
    if difference > 0.3**2 * size:
        return False
    model.get_input_embeddings().weight = head
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return True


def _check_size(config: Any, weights: int) -> None:
    """Refuse a model that is larger than the weights of its file, before it takes memory."""
    model = build_on_meta(CAUSAL, config, torch.float32, False)
    count = sum(parameter.numel() for parameter in model.parameters())
    # Tied weights are counted once here, and the file may store them once or twice.
    if count > 2 * weights:
        raise ValueError(f"its fields describe {count:,} weights, and its tensors hold {weights:,}")


def _tidy(folder: Path) -> None:
    """Remove traces of the GGUF file from config.json; give all files the same permissions."""
    config = read_json(folder / "config.json")
    for leftover in ("_model_name_or_path", "_name_or_path", "quantization_config"):
        config.pop(leftover, None)
    write_json(folder / "config.json", config)
    mode = (folder / "config.json").stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)  # the safetensors library makes its files readable by their owner alone


def _put_in_place(staging: Path, dest: Path) -> None:
    """Move the files of a folder into `dest`, in the place of what is there."""
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    # The configuration makes a folder a model, so it is removed first and appears last.
    kept = (staging.name, LOCK_NAME)
    old = [path for path in dest.iterdir() if path.name not in kept]
    for path in sorted(old, key=lambda path: path.name != "config.json"):
        remove(path)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, in_held(dest / path.name))
        fsync_folder(dest)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """While active, transformers and gguf show no progress bars; the caller shows its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # The bar of the GGUF reader has no switch, so its stream goes. Errors are raised anyway.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
