"""A whole model in memory: to score it, to let it write, to measure it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["DTYPES", "load_model"]

#: The dtypes that users can name, for computation and storage.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(folder: Path, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False) -> Any:
    """The causal LM of a checkpoint folder, dense or packed, in evaluation mode; safetensors only.

    `dtype` "auto" is the checkpoint's own.

    Raises:
        ValueError: it cannot be loaded; quotes the reason in one line.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises many kinds where files are missing or broken
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder}: the model could not be loaded ({type(error).__name__}: {reason})"
        ) from error
    return model.eval()
