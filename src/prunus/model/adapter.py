"""Adapters of peft, the layers that `recover --mode lora` trains. Only this file uses peft.

    add_lora       new layers in a model
    save_adapter   the folder of an adapter: adapter_config.json, adapter_model.safetensors
    merge_adapter  a checkpoint of the base with the update in its weights, to score it

Shape suffixes: R rank of the adapter, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunus.hardware.process_state import no_warnings
from prunus.model.checkpoint.files import write_json
from prunus.model.checkpoint.output_folder import auxiliary_files, copy_companion
from prunus.model.checkpoint.tensor_files import save_safetensors
from prunus.model.open_folder import ADAPTER_CONFIG
from prunus.words import require_library

WEIGHTS_NAME = "adapter_model.safetensors"
_NAME = "default"  # the name that peft gives to the only adapter of a model


def add_lora(
    model: Any,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    seed: int,
    base: str,
    transposed: bool = False,
) -> Any:
    """Add fresh LoRA layers (Hu et al. 2021, arXiv 2106.09685) to a model.

    A layer adds alpha / rank · B_OR A_RI to its linear, with A random and B zero. Only A and B are
    trained, in float32.

    Args:
        model: A causal language model, which changes.
        targets: Last parts of the names of the linears that get a layer, e.g. `q_proj`.
        rank: Rank R of the update.
        alpha: Scale of the update, before it is divided by the rank.
        seed: Seed of A. The random numbers of the caller stay as they are.
        base: The name of the base for the adapter's configuration.
        transposed: Whether the linears store (in, out), as GPT-2's Conv1D does.

    Returns:
        The model of peft.

    Raises:
        ModuleNotFoundError: peft is not installed; names the extra.
    """
    require_library("peft", "an adapter", "adapters")
    import peft

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(targets),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    # The warnings are about how peft uses transformers; a user can do nothing about them.
    with torch.random.fork_rng(devices=[]), no_warnings():
        torch.manual_seed(seed)
        return peft.PeftModelForCausalLM(model, config, _NAME)


def save_adapter(adapted: Any, folder: Path) -> dict[str, str]:
    """Write the adapter of a peft model as peft would, but each file atomically.

    Returns:
        Name of the file of weights -> SHA-256 (hex) of its bytes.
    """
    import peft

    tensors = peft.get_peft_model_state_dict(adapted, adapter_name=_NAME)
    digest = save_safetensors(folder / WEIGHTS_NAME, tensors)
    config = adapted.peft_config[_NAME].to_dict() | {"inference_mode": True}
    content = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }
    # The configuration comes last: a folder that has it is a whole adapter.
    write_json(folder / ADAPTER_CONFIG, content)
    return {WEIGHTS_NAME: digest}


def merge_adapter(folder: Path, base: Path, merged: Path) -> None:
    """Write the model of an adapter that prunus has made, with its update in the weights.

    Pruned weights that get an update are no zeros any more.

    Args:
        folder: The adapter.
        base: The checkpoint that it was trained on.
        merged: A folder for the result, with the tokenizer and the other files of the base.
    """
    import peft
    import transformers

    with no_warnings():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        adapted = peft.PeftModelForCausalLM.from_pretrained(model, str(folder))
        adapted.merge_and_unload().save_pretrained(merged)
    for file in auxiliary_files(base):
        if not (merged / file.name).exists():
            copy_companion(file, merged / file.name)
