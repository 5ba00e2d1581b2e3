"""Tiny checkpoints that can be written as GGUF files."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import models

from prunus.formats.gguf.file import GgufFile
from tiny import tiny_checkpoint
from tiny_tokenizer import VOCABULARY, byte_tokenizer

WIDE = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": VOCABULARY + 1}


def gguf_checkpoint(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Path:
    """A tiny checkpoint with a tokenizer of bytes and one merge, "ab"."""
    tiny_checkpoint(folder, family, dtype, **{**WIDE, **options})
    tokenizer = byte_tokenizer(bos=True)
    vocabulary = {**tokenizer.get_vocab(), "ab": VOCABULARY}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[("a", "b")])
    tokenizer.save_pretrained(folder)
    # Otherwise the class of a family adds tokens of its own.
    named = {"unk_token": "</s>", "pad_token": "</s>"}
    if family == "phi3":  # llama.cpp's converter asks which of the two tokenizers of Phi it is
        named["tokenizer_class"] = "GPT2Tokenizer"
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    return folder


def shape(file: GgufFile, name: str) -> tuple[int, ...]:
    return tuple(int(side) for side in reversed(file.tensors[name].shape))
