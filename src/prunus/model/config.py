"""The configuration of a checkpoint, and whether it can belong to the weights beside it."""

from __future__ import annotations

import math
import re
import textwrap
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from prunus.model.checkpoint.reader import Checkpoint

__all__ = ["check_sizes", "load_config"]

# Names of configuration fields that say how large the model is, and of fields that do not although
# their name looks so.
_SIZES = re.compile(
    r"(hidden|intermediate|vocab|embd|embed|inner|ffn|expert|head|layer|model|rank|conv|state|block)\w*$|d_\w+$"
)
_NOT_SIZES = re.compile(
    r"token_id|_type|_pdrop|dropout|eps|version|step|length|window|position|max_|chunk"
)
# Fields up to this value are let through in any checkpoint: some count things that are not weights.
_SMALL = 2**16

# `packed.description.METHOD`, from which this room may not import.
_PACKED = "prunus"


def load_config(folder: Path, trust_remote_code: bool = False, *, quantized: bool = False) -> Any:
    """The transformers configuration of a checkpoint folder.

    Args:
        folder: of the checkpoint.
        trust_remote_code: let transformers run code that comes with the checkpoint.
        quantized: accept a quantised model, and return the configuration of its dense form.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: this version of transformers does not know the model, or the model is quantised.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} has no config.json; is it a Hugging Face checkpoint folder?"
        )
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


def check_sizes(folder: Path, config: Any, checkpoint: Checkpoint) -> None:
    """Check that no size in a configuration exceeds all that the checkpoint stores.

    A damaged or hostile configuration can describe a model that fills any memory. This check comes
    before a model of that size is built.

    Args:
        folder: of the checkpoint, for the message.
        config: its configuration.
        checkpoint: its weights.

    Raises:
        ValueError: names the field.
    """
    numbers = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    for name, value in config.get_text_config().to_dict().items():
        if not isinstance(value, int) or isinstance(value, bool) or _NOT_SIZES.search(name):
            continue
        # A layer has at least one tensor, a unit of any other size at least one number.
        is_depth = re.search(r"layers?$", name)
        largest = len(checkpoint.tensors) if is_depth else max(numbers, _SMALL)
        if _SIZES.search(name) and value > largest:
            raise ValueError(
                f"{folder / 'config.json'} asks for {name} = {value:,}, and the checkpoint holds "
                f"{numbers:,} numbers in {len(checkpoint.tensors):,} tensors; config and weights "
                "do not belong together"
            )
