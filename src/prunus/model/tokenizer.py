"""The tokenizer or the image processor in a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer

from prunus.model.adapter import base_folder, is_adapter
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.config_limits import check_config, check_processor_files

_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers tokenizer of a checkpoint folder; an adapter may use that of its base.

    Raises:
        ValueError: there is none, a number in its files is beyond all limits, or it cannot be
            loaded; quotes the reason in one line.
    """
    if is_adapter(folder) and not any((folder / name).exists() for name in _FILES):
        folder = base_folder(folder)
    remedy = "add its files, or give token ids instead: a .safetensors file with input_ids"
    return _load(AutoTokenizer, folder, "tokenizer", remedy, trust_remote_code=trust_remote_code)


def tokenizer_of_loaded(model: Any, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a loaded transformers model, from the folder it was loaded from.

    Raises:
        ValueError: the model does not say where it was loaded from; see also `load_tokenizer`.
        FileNotFoundError: that folder is gone.
    """
    if not (name := str(getattr(model, "name_or_path", "") or "")):
        raise ValueError("the model does not say where it was loaded from")
    return load_tokenizer(resolve_folder(name), trust_remote_code)


def load_image_processor(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers image processor of a checkpoint folder; errors as of `load_tokenizer`.

    It resizes and normalises by Pillow, so that every host computes the same pixel values.
    """
    remedy = "add its preprocessor_config.json to the folder"
    options = {"backend": "pil", "trust_remote_code": trust_remote_code}
    return _load(AutoImageProcessor, folder, "image processor", remedy, **options)


def _load(loader: Any, folder: Path, what: str, remedy: str, **options: Any) -> Any:
    check_config(folder)
    check_processor_files(folder)
    try:
        return loader.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # transformers raises errors of many kinds for missing or bad files
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder}: no {what} could be loaded ({type(error).__name__}: {reason}); {remedy}"
        ) from error


def token_ids(folder: Path, trust_remote_code: bool = False) -> dict[str, int] | None:
    """Token -> id of a checkpoint's tokenizer; None if the folder has no tokenizer."""
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code)
    except ValueError:
        return None
    return dict(tokenizer.get_vocab())
