"""A whole model in memory: to score it, to let it write, to measure it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prunus.model.adapter import attach, base_folder, check_adapter, is_adapter
from prunus.model.kinds import CAUSAL, Kind

__all__ = ["import_architecture", "load_adapted", "load_model"]


def load_model(
    folder: Path,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    attention: str | None = None,
    kind: Kind = CAUSAL,
) -> Any:
    """The model of a folder (dense, packed, or an adapter) in evaluation mode; safetensors only.

    `dtype` "auto" is the checkpoint's own; `attention` one of transformers' implementations, which agree but for
    rounding, None its choice; an adapter is always loaded with that. `kind` says which class is loaded.

    Raises:
        ValueError: it cannot be loaded; quotes the reason in one line.
        ModuleNotFoundError, FileNotFoundError: see `load_adapted`.
    """
    import transformers

    if is_adapter(folder):
        return load_adapted(folder, dtype, trust_remote_code)
    try:
        model, loaded = getattr(transformers, kind.loader).from_pretrained(
            folder,
            output_loading_info=True,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            attn_implementation=attention,
        )
    except Exception as error:  # transformers raises many kinds where files are missing or broken
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder}: the model could not be loaded ({type(error).__name__}: {reason})"
        ) from error
    # transformers fills what it does not find with random numbers, and only warns.
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(key) for key in loaded.get(what) or ()):
            raise ValueError(
                f"{folder}: the model could not be loaded: {len(names)} of its weights are "
                f"{'not there' if what == 'missing_keys' else 'of another shape'} ({', '.join(names[:3])}"
                f"{', …' if len(names) > 3 else ''}); is the checkpoint whole, and is config.json its own?"
            )
    return model.eval()


def import_architecture(folder: Path) -> None:
    """Import what transformers needs for this model, by way of one without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def load_adapted(
    folder: Path, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> Any:
    """The base of an adapter with the adapter in place, in evaluation mode; safetensors only, nothing merged.

    `dtype` is the base's, "auto" its own; the adapter's few weights compute in float32, as when peft loads them.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: see `check_adapter`, and `load_model` for the base.
    """
    check_adapter(folder, trust_remote_code)
    base = base_folder(folder)
    return attach(load_model(base, dtype, trust_remote_code), folder, base).eval()
