"""What an adapter's configuration may ask of peft, checked before peft reads it.

peft takes many fields as regular expressions, which can run for ever, and makes tensors of any rank
that the configuration names. Here names are plain, and every rank is one that a tensor has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.model.checkpoint.reader import TensorInfo
from prunus.model.config_limits import read_config

_PLAIN = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_MAX_NAMES = 10_000
#: Lists of names of modules.
_LISTS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
    "layers_pattern",
)
#: Name of a module -> a value of its own.
_TABLES = ("rank_pattern", "alpha_pattern")
#: They change the model, import a package, or compute starting values that no stored adapter needs.
_UNUSED = (
    "layer_replication",
    "megatron_config",
    "eva_config",
    "corda_config",
    "arrow_config",
    "use_qalora",
)


def check_adapter_config(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Check an adapter_config.json against the tensors of the adapter.

    Args:
        tensors: name -> what the header of the adapter's weights says of the tensor.

    Returns:
        The content of the file.
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
    return config


def _check_names(path: Path, field: str, names: Any) -> None:
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
    """Ranks are at most the largest that a tensor has: peft makes tensors of the ranks it reads."""
    largest = max(
        (
            info.shape[0]
            for name, info in tensors.items()
            if re.search(r"\.lora(_embedding)?_A\b", name) and info.shape
        ),
        default=0,
    )
    ranks = {"r": config.get("r", 8)}
    ranks |= {f"rank_pattern.{name}": r for name, r in (config.get("rank_pattern") or {}).items()}
    for field, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= largest:
            raise ValueError(
                f"{path} has {field} = {str(rank)[:80]}, and the largest rank of a stored tensor "
                f"is {largest}; the two do not belong together"
            )
