"""Tiny checkpoints that can be written as GGUF files."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import models

import prunus
from changes import edit_json
from prunus.formats.gguf.file import GgufFile, new_fields, write_gguf
from prunus.formats.gguf.header import StoredTensor
from prunus.formats.gguf.layout import GgufLayout, layout_of
from prunus.formats.gguf.types import PLAIN
from prunus.model.open_folder import OpenFolder
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.rounding.compression_record import CompressionRecord
from tiny import tiny_checkpoint, token_ids
from tiny_tokenizer import VOCABULARY, byte_tokenizer

WIDE = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": VOCABULARY + 1}

#: Known family -> options with which llama.cpp computes it as transformers does.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 64},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    # Two blocks of the pattern that llama.cpp assumes.
    "gemma3_text": {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 8},
    "phi": {"intermediate_size": 1024, "num_key_value_heads": 4},
    "phi3": {},
    "mixtral": {},
    "qwen2_moe": {"moe_intermediate_size": 64, "head_dim": 64},
    "qwen3_moe": {"moe_intermediate_size": 64, "head_dim": 128, "norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
}


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
    edit_json(folder / "tokenizer_config.json", **named)
    return folder


def compress(dense: Path, out: Path, **options: Any) -> CompressionRecord:
    """Compress with the windows of `token_ids`, two at a time."""
    return prunus.compress(dense, out, **{"calibration": token_ids(), "batch": 2, **options})


def shape(file: GgufFile, name: str) -> tuple[int, ...]:
    return tuple(int(side) for side in reversed(file.tensors[name].shape))


def known_layout(folder: Path) -> tuple[GgufLayout, CheckpointSource]:
    """The layout that the package knows for a family."""
    source = CheckpointSource(OpenFolder(folder))
    skeleton = Skeleton(source.config, torch.bfloat16)
    source.bind(skeleton)
    return layout_of(source, skeleton), source


def known_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Content of all tensors of the file of a known family, float32."""
    layout, source = known_layout(folder)
    contents = {}
    for tensor in layout.tensors:
        parts = [source.weight(name) for name in tensor.sources] or [tensor.values()]
        rows = torch.cat(parts).float()[slice(None) if tensor.rows is None else tensor.rows]
        contents[tensor.name] = rows.reshape(tensor.shape) + tensor.shift
    return contents


def write_container(
    path: Path,
    contents: Mapping[str, torch.Tensor],
    fields: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """A file as a converter makes it: matrices in `dtype`, vectors and routers in float32.

    Without fields it is of a kind of model that nothing knows, with two blocks.
    """
    if fields is None:
        writer = new_fields("unheard-of")
        writer.add_uint32("unheard-of.block_count", 2)
        fields = writer.fields
    stored = []
    for name, content in contents.items():
        is_vector = content.dim() < 2 or "gate_inp" in name
        values = content.to(torch.float32 if is_vector else dtype).contiguous()
        number, read = PLAIN[values.dtype][1], partial(torch.clone, values)
        stored.append(StoredTensor(name, tuple(content.shape), number, values.nbytes, read))
    write_gguf(path, fields, stored)
    return path
