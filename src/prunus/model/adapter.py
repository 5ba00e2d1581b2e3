"""Adapters: folders that hold a change to a base model, as peft saves them.

Such a folder has an `adapter_config.json`, which names the base, and an
`adapter_model.safetensors`. Only this file uses peft.

Outline: functions to load an adapter (`attach`), to make and save one (`add_lora`, `save_adapter`),
and at the end the checks of a configuration before peft reads it.

Shape suffixes: R rank of the adapter, O outputs, I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prunus.hardware.numerics import check_finite
from prunus.hardware.process_state import no_warnings
from prunus.model.checkpoint.files import write_json
from prunus.model.checkpoint.resolve import CONFIG_NAME, base_folder
from prunus.model.checkpoint.tensor_files import Checkpoint, TensorInfo, save_safetensors
from prunus.model.config import load_config, read_config
from prunus.model.kinds import CAUSAL
from prunus.model.meta_model import build_on_meta
from prunus.words import naming, reason, require_library

WEIGHTS_NAME = "adapter_model.safetensors"
_NAME = "default"  # the name that peft gives to the only adapter of a model
# What a name in a configuration may be; a regular expression that peft would run is not.
_PLAIN = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_MAX_NAMES = 10_000
#: Fields with lists of names of modules.
_LISTS = (
    "target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern",
)  # fmt: skip
#: Fields that map the name of a module to a value.
_TABLES = ("rank_pattern", "alpha_pattern")
#: Fields that are refused. They change the model, import a package, or compute starting values that
#: no stored adapter needs.
_UNUSED = (
    "layer_replication", "megatron_config", "eva_config", "corda_config", "arrow_config",
    "use_qalora",
)  # fmt: skip


def check_adapter(folder: Path, trust_remote_code: bool = False) -> None:
    """Check that an adapter is whole and fits its base, by names and shapes.

    No weight of the base is read: its model is built on the meta device.

    Raises:
        ModuleNotFoundError: peft is not installed; names the extra.
        FileNotFoundError: The base or the weights of the adapter are not there.
        ValueError: The adapter is damaged or does not fit.
    """
    require_library("peft", "an adapter", "adapters")
    base = base_folder(folder)
    with naming(f"{base}, the base of {folder}"):
        config = load_config(base, trust_remote_code)
    model = build_on_meta(CAUSAL, config, torch.float32, trust_remote_code)
    attach(model, folder, base)


def attach(model: Any, folder: Path, base: Path) -> Any:
    """Put the layers of an adapter into a model.

    Args:
        model: The base, which changes. It can be on the meta device.
        folder: Folder of the adapter.
        base: Folder of the base, for messages.

    Returns:
        The model of peft.

    Raises:
        FileNotFoundError: The folder has no weights in safetensors.
        ValueError: The adapter is damaged, asks peft for what prunus does not support, or does not
            fit.
    """
    import peft

    if not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS_NAME}; adapters are read from safetensors only, never from "
            "pickles"
        )
    checkpoint = Checkpoint(folder, only=[WEIGHTS_NAME])
    check_adapter_config(folder / CONFIG_NAME, checkpoint.tensors)
    tensors = dict(checkpoint.read(checkpoint.tensors))
    check_finite(tensors, f"{folder}: ")
    unfit = f"the adapter {folder} does not fit its base {base}"
    hint = "was it trained on another model?"
    # The new layers are on the device of the model, which may be the meta device.
    # peft only warns of what is an error here.
    with torch.device(next(model.parameters()).device), no_warnings():
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            # The weights are loaded next. Some ways to make starting values take minutes.
            config.init_lora_weights = False
            adapted = peft.PeftModelForCausalLM(model, config, _NAME)
            result = peft.set_peft_model_state_dict(adapted, tensors, _NAME)
        except Exception as error:  # peft and torch raise errors of many kinds, a line per tensor
            raise ValueError(f"{unfit}: {hint} ({reason(error)})") from error
    missing = [name for name in result.missing_keys if f".{_NAME}" in name]
    if names := result.unexpected_keys or missing:
        what = "the adapter lacks" if names is missing else "it has no place for"
        raise ValueError(f"{unfit}: {what} {names[0]} and {len(names) - 1} more tensors; {hint}")
    return adapted


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
    write_json(folder / CONFIG_NAME, content)
    return {WEIGHTS_NAME: digest}


# --- what a configuration may ask of peft, checked before peft reads it ---

# peft takes many fields as regular expressions, which can run for ever, and makes tensors of any
# rank that the configuration names. Here names are plain, and every rank is one that a tensor has.


def check_adapter_config(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Check an adapter_config.json against the tensors of the adapter.

    Args:
        path: The configuration.
        tensors: Name -> what the header of the adapter's weights says of the tensor.

    Raises:
        ValueError: The file is no JSON object, describes no LoRA, sets a field that prunus does not
            support, has something other than plain names in its lists, or a rank beyond those of
            the tensors; names the field.
    """
    config = read_config(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} has peft_type {config.get('peft_type')!r}; prunus loads adapters of type LORA"
        )
    for field in _UNUSED:
        if config.get(field):
            raise ValueError(
                f"{path} sets {field}, which prunus does not support; merge the adapter into its "
                "base first"
            )
    for field in _LISTS:
        _check_names(path, field, config.get(field))
    for field in _TABLES:
        table = config.get(field) or {}
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {field} must map names to numbers, not {str(table)[:80]!r}")
        _check_names(path, field, list(table))
    _check_ranks(path, config, tensors)


def _check_names(path: Path, field: str, names: Any) -> None:
    """Check that a field holds plain names of modules, or nothing."""
    if names is None or names == "all-linear":
        return
    if isinstance(names, str) and field != "layers_pattern":
        raise ValueError(
            f"{path}: {field} is {names[:80]!r}, which peft takes for a regular expression; give a "
            'list of names, such as ["q_proj", "v_proj"]'
        )
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, list) or len(listed) > _MAX_NAMES:
        raise ValueError(f"{path}: {field} must be a list of at most {_MAX_NAMES:,} names")
    for name in listed:
        if not isinstance(name, str) or len(name) > 1000 or not _PLAIN.fullmatch(name):
            raise ValueError(
                f"{path}: {field} holds {str(name)[:80]!r}, which is no plain name of a module: "
                "letters, digits, '_' and dots between them"
            )


def _check_ranks(path: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Check that no rank is larger than the largest of a stored tensor.

    peft makes tensors of the ranks that it reads.
    """
    inner = [x for name, x in tensors.items() if re.search(r"\.lora(_embedding)?_A\b", name)]
    largest = max((info.shape[0] for info in inner if info.shape), default=0)
    ranks = {"r": config.get("r", 8)}
    ranks |= {f"rank_pattern.{name}": r for name, r in (config.get("rank_pattern") or {}).items()}
    for field, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= largest:
            raise ValueError(
                f"{path} has {field} = {str(rank)[:80]}, and the largest rank of a stored tensor "
                f"is {largest}; the two do not belong together"
            )
