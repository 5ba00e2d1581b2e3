"""The configuration of a checkpoint, and whether it can belong to the weights next to it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.config_limits import check_config

# `packed.description.METHOD`, from which this room may not import.
_PACKED = "prunus"


def require_config(folder: Path) -> None:
    """Raise FileNotFoundError unless a folder has a config.json."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} has no config.json; is it a Hugging Face checkpoint folder?"
        )


def load_config(
    folder: Path,
    trust_remote_code: bool = False,
    *,
    quantized: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Any:
    """The transformers configuration of a checkpoint folder.

    Its numbers are compared with the weights before transformers sees them; see `config_limits`.

    Args:
        quantized: accept a quantised model, and return the configuration of its dense form.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: this version of transformers does not know the model, the model is quantised, or
            a number in the configuration exceeds all that the checkpoint stores.
    """
    require_config(folder)
    check_config(folder, checkpoint)
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as fault:  # transformers raises errors of many kinds for a damaged file
        reason = textwrap.shorten(str(fault), 300, placeholder=" …")
        raise ValueError(
            f"{folder / 'config.json'} describes no model that transformers "
            f"{transformers.__version__} knows: {reason}"
        ) from fault
    if quantized and hasattr(config, "quantization_config"):
        del config.quantization_config
    described = getattr(config, "quantization_config", None)
    if described and _method(described) == _PACKED:
        raise ValueError(
            f"{folder} is packed already; give the checkpoint that it was packed from, or turn it "
            "back with prunus unpack first"
        )
    if described:
        raise ValueError(
            f"{folder} holds quantised weights; prune the full-precision checkpoint, then quantise "
            "the result"
        )
    return config


def _method(described: Any) -> Any:
    """Return the name of the quantisation in a `quantization_config`, a dict or an object."""
    if isinstance(described, dict):
        return described.get("quant_method")
    return getattr(described, "quant_method", None)
