"""The model to evaluate on text: found, and checked against its tokenizer before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunus.evaluation.watched import WatchedCheckpoint
from prunus.model.adapter import base_folder, check_adapter, is_adapter
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.config import load_config
from prunus.model.kinds import require_causal
from prunus.model.tokenizer import load_tokenizer, token_ids, tokenizer_of_loaded


def find_folder(model: str | Path) -> Path:
    """The folder of a checkpoint or an adapter; a hub id is downloaded."""
    folder = resolve_folder(model)
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        raise FileNotFoundError(
            f"{model}: no config.json in this folder; is it a Hugging Face checkpoint?"
        )
    return folder


@dataclass(frozen=True)
class ModelInput:
    """A causal language model to evaluate; `find_model` creates it.

    Attributes:
        name: what the user calls it.
        folder: the checkpoint, or None for a loaded model.
        loaded: the loaded model, or None for a folder.
        trust_remote_code: run the code of the checkpoint.
    """

    name: str
    folder: Path | None
    loaded: Any
    trust_remote_code: bool

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens that the model knows; None if its configuration does not say."""
        if self.folder is None:
            return int(self.loaded.get_input_embeddings().num_embeddings)
        config = _config(self.folder, self.trust_remote_code).get_text_config()
        size = getattr(config, "vocab_size", None)
        return size if isinstance(size, int) else None

    def tokens(self) -> dict[str, int] | None:
        """Token -> id of the tokenizer of a folder; None if it has none, or for a loaded model."""
        return None if self.folder is None else token_ids(self.folder, self.trust_remote_code)

    def watch(self) -> WatchedCheckpoint | None:
        """The files of the checkpoint as they are now; None for a loaded model."""
        return None if self.folder is None else WatchedCheckpoint(self.folder)

    def tokenizer(self, given: Any = None) -> Any:
        """The tokenizer: the one that is given, or that of the folder the model is loaded from."""
        if given is not None:
            return given
        if self.folder is not None:
            return load_tokenizer(self.folder, self.trust_remote_code)
        try:
            return tokenizer_of_loaded(self.loaded, self.trust_remote_code)
        except (ValueError, FileNotFoundError) as fault:
            raise ValueError(
                "scoring a loaded model needs its tokenizer: pass `tokenizer`, or score a file of "
                f"input_ids ({fault})"
            ) from fault

    def fitting_tokenizer(self, given: Any = None) -> Any:
        """As `tokenizer`, and the embedding has a row for each of its ordinary tokens.

        Special tokens that were added past the end of the embedding are allowed: they may never
        occur.
        """
        found, size = self.tokenizer(given), self.vocabulary
        if size is not None and found.vocab_size > size:
            raise ValueError(
                f"{self.name}: its tokenizer has {found.vocab_size} tokens, the model a vocabulary "
                f"of {size}; the tokenizer does not fit, is it another model's?"
            )
        return found


def find_model(model: Any, trust_remote_code: bool = False) -> ModelInput:
    """Find a model, and check its kind. Reads no weights.

    Raises:
        FileNotFoundError: no such model, or no model in the folder.
        NotImplementedError: the model is not a causal language model.
        ValueError: its configuration cannot be loaded; or see `check_adapter`.
        ModuleNotFoundError: an adapter is given, and peft is not installed.
    """
    if isinstance(model, nn.Module):
        name = str(getattr(model, "name_or_path", "")) or type(model).__name__
        return ModelInput(name, None, model, trust_remote_code)
    folder = find_folder(model)
    if is_adapter(folder):
        check_adapter(folder, trust_remote_code)
    require_causal(_config(folder, trust_remote_code), "scoring on text")
    return ModelInput(str(model), folder, None, trust_remote_code)


def check_as_loaded(model: Any, dtype: str, device: str) -> None:
    """Check that nobody asks for another dtype or device of a loaded model."""
    if isinstance(model, nn.Module) and (dtype != "auto" or device != "auto"):
        raise ValueError(
            "a loaded model is scored as it is: leave `dtype` and `device` at 'auto', or "
            "convert it before"
        )


def check_same_vocabulary(model: ModelInput, reference: ModelInput) -> None:
    """Check that two models give logits for the same tokens. Reads no weights."""
    hint = "give a reference with the same vocabulary, such as the dense model"
    sizes = model.vocabulary, reference.vocabulary
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"the reference {reference.name} has a vocabulary of {sizes[1]} tokens, {model.name} "
            f"one of {sizes[0]}: {hint}"
        )
    tokens, others = model.tokens(), reference.tokens()
    if tokens is None or others is None or tokens == others:
        return
    token = min(dict(tokens.items() ^ others.items()))
    raise ValueError(
        f"the tokenizers of the reference {reference.name} and of {model.name} differ, at "
        f"{token!r} for one: {hint}"
    )


def _config(folder: Path, trust_remote_code: bool) -> Any:
    """The configuration of a checkpoint, or of the checkpoint that an adapter is for."""
    while is_adapter(folder):
        folder = base_folder(folder)
    return load_config(folder, trust_remote_code, quantized=True)
