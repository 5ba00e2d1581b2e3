"""A whole model in memory: to evaluate it, to let it write text, to measure its speed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from prunus.model.adapter import attach, base_folder, check_adapter, is_adapter
from prunus.model.config import load_config
from prunus.model.kinds import Kind, kind_of
from prunus.model.meta_model import build_on_meta

__all__ = ["import_architecture", "load_adapted", "load_model"]


def load_model(
    folder: Path,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    attention: str | None = None,
    kind: Kind | None = None,
    mapped: bool = True,
) -> Any:
    """The model of a folder (dense, packed, or an adapter), in evaluation mode; safetensors only.

    Args:
        folder: a checkpoint or an adapter.
        dtype: of weights and computation; "auto" is that of the checkpoint.
        trust_remote_code: let transformers run code that comes with the checkpoint.
        attention: one of transformers' implementations, which agree up to rounding; None for the
            default of transformers, which an adapter always gets.
        kind: which class of transformers loads it; None for what its configuration says. An
            adapter is always a causal LM.
        mapped: weights that are used as they are stored may be views of the mapped files. False
            reads them into memory. A file that is changed later then changes no weight, and one
            that is cut short does not kill the process.

    Raises:
        ValueError: it cannot be loaded, or its configuration describes a model far larger than its
            weights; quotes the reason in one line.
        NotImplementedError: it is of a kind that prunus does not know.
        ModuleNotFoundError, FileNotFoundError: see `load_adapted`.
    """
    import transformers

    if is_adapter(folder):
        return load_adapted(folder, dtype, trust_remote_code)
    kind = _check_architecture(folder, trust_remote_code, kind)
    try:
        model, loaded = getattr(transformers, kind.loader).from_pretrained(
            folder,
            output_loading_info=True,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            attn_implementation=attention,
            **_in_memory(mapped),
        )
    except Exception as error:  # transformers raises errors of many kinds for missing or bad files
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder}: the model could not be loaded ({type(error).__name__}: {reason})"
        ) from error
    # transformers only warns of weights that it does not find, and fills them with random numbers.
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(key) for key in loaded.get(what) or ()):
            problem = "not there" if what == "missing_keys" else "of another shape"
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            raise ValueError(
                f"{folder}: the model could not be loaded: {len(names)} of its weights are "
                f"{problem} ({shown}); is the checkpoint whole, and is config.json its own?"
            )
    return model.eval()


def _in_memory(mapped: bool) -> dict[str, bool]:
    """The option of transformers that reads files into memory, as far as this version has it."""
    from transformers import PreTrainedModel

    known = inspect.signature(PreTrainedModel.from_pretrained).parameters
    return {} if mapped or "disable_mmap" not in known else {"disable_mmap": True}


def import_architecture(folder: Path) -> None:
    """Import the code that transformers needs for this model, by building it without weights.

    Measurements of memory call it first, so that they do not count the imported code.
    """
    _check_architecture(folder)


def _check_architecture(
    folder: Path, trust_remote_code: bool = False, kind: Kind | None = None
) -> Kind:
    """Build the model of a folder without weights, within the limits of `build_on_meta`."""
    config = load_config(folder, trust_remote_code, quantized=True)
    kind = kind or kind_of(config)
    build_on_meta(kind, config, torch.float32, trust_remote_code)
    return kind


def load_adapted(
    folder: Path, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> Any:
    """The base of an adapter with the adapter in place, in evaluation mode; nothing is merged.

    Args:
        folder: of the adapter.
        dtype: of the base. The few weights of the adapter compute in float32, as peft loads them.
        trust_remote_code: let transformers run code that comes with the base.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: see `check_adapter`, and `load_model`
            for the base.
    """
    check_adapter(folder, trust_remote_code)
    base = base_folder(folder)
    return attach(load_model(base, dtype, trust_remote_code), folder, base).eval()
