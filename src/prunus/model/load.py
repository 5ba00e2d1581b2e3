"""One call from a path to a model that runs, with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from prunus.model.adapter import base_folder, is_adapter
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.config import load_config
from prunus.model.device import choose_device
from prunus.model.image_processor import load_image_processor
from prunus.model.kinds import IMAGES, kind_of
from prunus.model.loading import load_model
from prunus.model.records import keep_records, records_of
from prunus.model.tokenizer import load_tokenizer

__all__ = ["LoadedModel", "load"]


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
        trust_remote_code: Run model code that comes with the checkpoint.

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
