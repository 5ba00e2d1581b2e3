"""A whole model in memory, with its tokenizer for users, or for evaluation."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prunus.model.adapter import attach, base_folder, check_adapter, is_adapter
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.config import load_config
from prunus.model.device import choose_device
from prunus.model.kinds import IMAGES, Kind, kind_of
from prunus.model.meta_model import build_on_meta
from prunus.model.saving import keep_records, records_of
from prunus.model.tokenizer import load_image_processor, load_tokenizer


class LoadedModel(NamedTuple):
    """A model in memory and what turns text into its inputs; `model, tokenizer = load(path)`.

    Attributes:
        model: A transformers model in evaluation mode.
        tokenizer: Its tokenizer; of an image classifier its image processor.
    """

    model: Any
    tokenizer: Any


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load any model that prunus reads or writes: dense, pruned, packed, compressed, an adapter.

    A packed model stays packed in memory. An adapter is loaded with the model that it is for. Where
    prunus wrote the checkpoint, the model's `save_pretrained` and `push_to_hub` keep its model card
    and its record.

    Args:
        model: Folder of a checkpoint or an adapter, or a hub id.
        dtype: Of the weights and the computation, as a torch dtype or its name; "auto" is that of
            the checkpoint.
        device: auto, cpu, cuda or cuda:i; auto takes a CUDA device if there is one.
        trust_remote_code: Run the model code of the checkpoint.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        FileNotFoundError: There is no such folder, and no such model on the hub.
        ValueError: A file is damaged or missing; quotes the reason in one line.
        NotImplementedError: The model is of a kind that prunus does not know.
        ModuleNotFoundError: An adapter is given, and peft is not installed.
    """
    place = choose_device(device)
    folder = resolve_folder(model)
    base = base_folder(folder) if is_adapter(folder) else folder
    kind = kind_of(load_config(base, trust_remote_code, quantized=True))
    read = load_image_processor if kind is IMAGES else load_tokenizer
    # The tokenizer comes first: what is wrong with it shows before the weights are read.
    tokenizer = read(folder, trust_remote_code)
    loaded = load_model(folder, dtype, trust_remote_code, kind=kind)
    if not is_adapter(folder):
        keep_records(loaded, records_of(folder))
    return LoadedModel(loaded.to(place), tokenizer)


def load_model(
    folder: Path,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    attention: str | None = None,
    kind: Kind | None = None,
    mapped: bool = True,
) -> Any:
    """The model of a folder (dense, packed, or an adapter), in evaluation mode; safetensors only.

    The weights of an adapter are not merged. They compute in float32, as peft loads them.

    Args:
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
        ModuleNotFoundError, FileNotFoundError: see `check_adapter`.
    """
    import transformers

    if is_adapter(folder):
        check_adapter(folder, trust_remote_code)
        base = base_folder(folder)
        return attach(load_model(base, dtype, trust_remote_code), folder, base).eval()
    kind = check_architecture(folder, trust_remote_code, kind)
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


def check_architecture(
    folder: Path, trust_remote_code: bool = False, kind: Kind | None = None
) -> Kind:
    """Build the model of a folder without weights, within the limits of `build_on_meta`.

    This also imports the code that transformers needs for the model.

    Returns:
        `kind`, or what the configuration says.
    """
    config = load_config(folder, trust_remote_code, quantized=True)
    kind = kind or kind_of(config)
    build_on_meta(kind, config, torch.float32, trust_remote_code)
    return kind
