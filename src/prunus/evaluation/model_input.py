"""The model to evaluate: found, checked before any work, loaded, and watched meanwhile.

Blocks are read when their turn comes, and several models one after the other. Figures of a file
that is written to in between would belong to no model at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.distributed import fail_together
from prunus.hardware.machine import describe_hardware, versions
from prunus.hardware.numerics import check_finite
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.checkpoint.tensor_files import INDEX_NAME
from prunus.model.device import DTYPES
from prunus.model.kinds import require_causal
from prunus.model.loading import load_model
from prunus.model.open_folder import OpenFolder
from prunus.model.tokenizer import (
    Vocabulary,
    check_same_vocabulary,
    load_tokenizer,
    tokenizer_of_loaded,
)


@dataclass(frozen=True)
class ComputeOptions:
    """How models are loaded and computed."""

    #: A name of `DTYPES`, or "auto" for the dtype in which transformers would load a model.
    dtype: str
    #: Where models are computed.
    device: torch.device
    #: Budget in bytes for the whole process; None takes what is free.
    memory: int | None = None

    def protocol(self, batch: int | str, loaded: Any = None) -> dict[str, Any]:
        """How a model is evaluated: hardware, versions, dtype and batch, as values for JSON.

        `loaded` is the model if the caller loaded it, which decides the dtype; else None.
        """
        dtype = str(self.dtype if loaded is None else loaded.dtype).removeprefix("torch.")
        of_model = {"versions": versions(), "dtype": dtype, "batch": batch}
        return describe_hardware(self.device) | of_model


@dataclass(frozen=True)
class ModelInput:
    """A causal language model to evaluate, in a folder or loaded; `find_model` creates it."""

    #: What the caller calls it.
    name: str
    #: The checkpoint; None for a loaded model.
    folder: OpenFolder | None
    #: The loaded model; None for a folder.
    loaded: Any
    #: Whether code that comes with the checkpoint may run.
    trust_remote_code: bool

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens that the model knows; None if its configuration does not say."""
        if self.folder is None:
            return int(self.loaded.get_input_embeddings().num_embeddings)
        return self.folder.vocabulary

    def load_model(self, compute: ComputeOptions) -> Any:
        """The whole model: a loaded one as it is, that of a folder on the device of `compute`."""
        if self.folder is None:
            return self.loaded
        return load_model(self.folder, DTYPES.get(compute.dtype, "auto")).to(compute.device)

    def tokenizer(self, chosen: Any = None) -> Any:
        """The tokenizer: the one that the caller chose, or that of the model's folder.

        Raises:
            ValueError: `chosen` is None, and the model was not loaded from a folder with one.
        """
        if chosen is not None:
            return chosen
        if self.folder is not None:
            return load_tokenizer(self.folder)
        try:
            return tokenizer_of_loaded(self.loaded, self.trust_remote_code)
        except (ValueError, FileNotFoundError) as fault:
            raise ValueError(
                "scoring a loaded model needs its tokenizer: pass `tokenizer`, or score a file of "
                f"input_ids ({fault})"
            ) from fault


def find_model(
    model: Any, trust_remote_code: bool = False, say: Callable[[str], None] | None = None
) -> ModelInput:
    """Find a model, and check its kind. Reads no weights but those of a GGUF file.

    Args:
        model: A folder, a GGUF file, a hub id, or a loaded transformers model, whose weights must
            be numbers. What was found before is returned as it is.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        say: Called with a line of text before a GGUF file is read; None to be silent.

    Raises:
        FileNotFoundError, ValueError: There is no such model, or its configuration is damaged.
        NotImplementedError: It is not a causal language model.
    """
    if isinstance(model, ModelInput):
        return model
    if isinstance(model, nn.Module):
        name = str(getattr(model, "name_or_path", "")) or type(model).__name__
        check_finite(dict(model.named_parameters()), f"{name}: ")
        return ModelInput(name, None, model, trust_remote_code)
    folder = open_folder(model, trust_remote_code, say)
    require_causal(folder.config, "scoring on text")
    return ModelInput(str(model), folder, None, trust_remote_code)


def check_as_loaded(model: Any, dtype: str, device: str) -> None:
    """Check that nobody asks for another dtype or device of a loaded model.

    Raises:
        ValueError: Somebody does.
    """
    if isinstance(model, nn.Module) and (dtype != "auto" or device != "auto"):
        raise ValueError(
            "a loaded model is scored as it is: leave `dtype` and `device` at 'auto', or "
            "convert it before"
        )


def check_reference(model: ModelInput, reference: ModelInput) -> None:
    """Check that a model and its reference give logits for the same tokens.

    Raises:
        ValueError: They do not.
    """
    first, second = (
        Vocabulary(name, one.vocabulary, one.folder)
        for name, one in ((f"the reference {reference.name}", reference), (model.name, model))
    )
    remedy = "give a reference with the same vocabulary, such as the dense model"
    check_same_vocabulary(first, second, remedy)


def _states(folder: OpenFolder) -> dict[Path, tuple[int, int]]:
    """The files of one checkpoint that decide its figures."""
    index = folder.path / INDEX_NAME
    paths = [*sorted(folder.path.glob("*.safetensors")), folder.config_path, index]
    return {
        path: (state.st_size, state.st_mtime_ns)
        for path in paths
        if path.is_file() and (state := path.stat())
    }


@contextlib.contextmanager
def unchanged(*folders: OpenFolder | None) -> Iterator[None]:
    """A `with` block that fails on all processes if a file was changed, added or removed meanwhile.

    Args:
        folders: Checkpoints, whose weights, index and configuration are watched; None is passed
            over.

    Raises:
        ValueError: The files are not what they were at the start.
    """
    watched = [(folder, _states(folder)) for folder in folders if folder is not None]

    def check() -> None:
        for folder, before in watched:
            now = _states(folder)
            for path in before | now:
                if before.get(path) != now.get(path):
                    raise ValueError(
                        f"{path} was changed while the model was scored, so the figures would "
                        "belong to no model. Leave the checkpoint as it is, and score it again"
                    )

    try:
        yield
    except Exception:
        # Half-written weights cause errors of many kinds. Name the cause, not its effect.
        check()
        raise
    with fail_together():
        check()
