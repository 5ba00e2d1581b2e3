"""The model to evaluate on text: found, and checked against its tokenizer before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunus.model.adapter import base_folder, check_adapter, is_adapter
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.config import load_config
from prunus.model.kinds import require_causal
from prunus.model.tokenizer import load_tokenizer, token_ids

__all__ = [
    "ModelInput",
    "check_language_model",
    "check_same_vocabulary",
    "find_folder",
    "resolve_model_input",
]


@dataclass(frozen=True)
class ModelInput:
    """A model to evaluate: a checkpoint folder, or a loaded model.

    Attributes:
        name: what the user calls it.
        tokenizer: its tokenizer.
        folder: the checkpoint, or None for a loaded model.
        loaded: the loaded model, or None for a folder.
    """

    name: str
    tokenizer: Any
    folder: Path | None = None
    loaded: Any = None


def find_folder(model: str | Path) -> Path:
    """The folder of a checkpoint or an adapter; a hub id is downloaded.

    Raises:
        FileNotFoundError: neither a folder nor a hub id, or a folder without a model.
    """
    folder = resolve_folder(model)
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        raise FileNotFoundError(
            f"{model}: no config.json in this folder; is it a Hugging Face checkpoint?"
        )
    return folder


def resolve_model_input(model: Any, tokenizer: Any, trust_remote_code: bool) -> ModelInput:
    """Check that a model exists and that its adapter and its tokenizer fit. Reads no weights.

    Args:
        model: a folder, a hub id, or a loaded transformers model.
        tokenizer: the tokenizer of a loaded model; for others, None takes the one in the folder.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: no tokenizer, or another model's; a configuration that cannot be loaded; see
            `check_adapter`.
        FileNotFoundError: no such model, or no model in the folder.
        ModuleNotFoundError: an adapter is given, and peft is not installed.
        NotImplementedError: the model is not a causal language model.
    """
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ValueError("a loaded model comes without its tokenizer: pass tokenizer=")
        name = str(getattr(model, "name_or_path", "")) or type(model).__name__
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        _check_tokenizer(name, tokenizer, embedding.num_embeddings)
        return ModelInput(name, tokenizer, loaded=model)
    folder = find_folder(model)
    if is_adapter(folder):
        check_adapter(folder, trust_remote_code)
    check_language_model(folder, trust_remote_code)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(folder, trust_remote_code)
    _check_tokenizer(str(model), tokenizer, _vocabulary(folder, trust_remote_code))
    return ModelInput(str(model), tokenizer, folder)


def check_language_model(folder: Path, trust_remote_code: bool) -> None:
    """Check that a folder holds a causal language model, or an adapter for one.

    Raises:
        NotImplementedError: it holds another kind of model.
        ValueError: its configuration cannot be loaded.
    """
    require_causal(_config(folder, trust_remote_code), "scoring on text")


def check_same_vocabulary(model: Any, reference: Any, trust_remote_code: bool) -> None:
    """Check that two models give logits for the same tokens. Reads no weights.

    Args:
        model: a folder, a hub id, or a loaded transformers model.
        reference: the same. The tokenizers are compared if both are folders that have one.
        trust_remote_code: run code that comes with the checkpoints.

    Raises:
        ValueError: the sizes of the vocabularies differ, or the tokenizers do.
        FileNotFoundError, NotImplementedError: see `find_folder` and `check_language_model`.
    """
    sizes: list[int | None] = []
    tokens: list[dict[str, int] | None] = []
    for one in (model, reference):
        if isinstance(one, nn.Module):
            embedding: Any = one.get_input_embeddings()  # type: ignore[operator]
            sizes.append(embedding.num_embeddings)
            tokens.append(None)
            continue
        folder = find_folder(one)
        check_language_model(folder, trust_remote_code)
        sizes.append(_vocabulary(folder, trust_remote_code))
        tokens.append(token_ids(folder, trust_remote_code))
    hint = "give a reference with the same vocabulary, such as the dense model"
    names = [
        type(one).__name__ if isinstance(one, nn.Module) else one for one in (model, reference)
    ]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"the reference {names[1]} has a vocabulary of {sizes[1]} tokens, {names[0]} one of "
            f"{sizes[0]}: {hint}"
        )
    if tokens[0] is None or tokens[1] is None or tokens[0] == tokens[1]:
        return
    token = min(dict(tokens[0].items() ^ tokens[1].items()))
    raise ValueError(
        f"the tokenizers of the reference {names[1]} and of {names[0]} differ, at {token!r} for "
        f"one: {hint}"
    )


def _vocabulary(folder: Path, trust_remote_code: bool) -> int | None:
    size = getattr(_config(folder, trust_remote_code).get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def _config(folder: Path, trust_remote_code: bool) -> Any:
    """The configuration of a checkpoint, or of the checkpoint that an adapter is for."""
    while is_adapter(folder):
        folder = base_folder(folder)
    return load_config(folder, trust_remote_code, quantized=True)


def _check_tokenizer(name: str, tokenizer: Any, vocabulary: int | None) -> None:
    """Check that the embedding has a row for every ordinary token.

    Special tokens that were added past the end of the embedding are allowed: they may never occur.
    """
    if vocabulary is not None and tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"{name}: its tokenizer has {tokenizer.vocab_size} tokens, the model a vocabulary of "
            f"{vocabulary}; the tokenizer does not fit, is it another model's?"
        )
