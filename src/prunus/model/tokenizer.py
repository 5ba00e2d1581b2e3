"""The tokenizer that lies beside a checkpoint's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

__all__ = ["load_tokenizer"]


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers tokenizer of a checkpoint folder.

    Raises:
        ValueError: there is none, or it cannot be loaded; quotes the reason in one line.
    """
    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds where files are missing or broken
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder}: no tokenizer could be loaded ({type(error).__name__}: {reason}); add its files, or give "
            "token ids instead: a .safetensors file with input_ids"
        ) from error
