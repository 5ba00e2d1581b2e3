"""The size of a compressed checkpoint: all files with weights, as planned or as written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from prunus.formats.records import FileSize
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.embeddings import is_plain
from prunus.model.linears import tied_embedding
from prunus.model.source import CheckpointSource


def file_size(
    source: CheckpointSource, model: Any, tensors: Mapping[str, Any], after: int
) -> FileSize:
    """The size of a result and what takes its bytes.

    Args:
        source: The source.
        model: The skeleton of the source.
        tensors: Stored name -> something with a shape and a dtype, of all tensors of the result.
        after: Bytes of the files of the result.
    """
    # The embedding comes last, so that a tied head counts as embedding.
    modules = {id(model.get_output_embeddings()): "output head"}
    modules[id(model.get_input_embeddings())] = "embeddings"
    kinds = {
        source.stored.get(f"{name}.weight", name).removesuffix(".weight"): modules[id(module)]
        for name, module in reversed(list(model.named_modules()))
        if id(module) in modules
    }
    parts = Counter[str]()
    for name, info in tensors.items():
        linear = name.rpartition(".")[0]
        dense = source.checkpoint.tensors.get(name)
        packed = dense is None or dense.dtype != info.dtype
        kind = "other weights" if len(info.shape) > 1 else "norms and biases"
        kind = kinds.get(linear, "linears" if packed else kind)
        what = f"packed {kind}" if packed else f"{kind} in {str(info.dtype).partition('.')[2]}"
        parts[what] += math.prod(info.shape) * info.dtype.itemsize
    return size_of(source.checkpoint, after, parts)


def size_of(source: Checkpoint, after: int, parts: Counter[str]) -> FileSize:
    """The size of a result that has `after` bytes in these parts."""
    parameters = sum(math.prod(info.shape) for info in source.tensors.values())
    return FileSize.of(source.file_bytes(), after, parameters, parts)


def embedding_and_head(model: Any, stored: Mapping[str, str]) -> dict[str, list[str]]:
    """The embedding and the head that the packed format can hold; only the first if they are tied.

    Args:
        model: The skeleton of the source.
        stored: Name in the model -> stored name, as in `CheckpointSource`.

    Returns:
        Stored name of the weight -> stored names of copies of it: a tied head may be stored too.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    keys = [
        stored.get(names.get(id(module), ""), "") if module is not None and is_plain(module) else ""
        for module in (embedding, head)
    ]
    if not tied:
        return {key: [] for key in keys if key.endswith(".weight")}
    # A checkpoint may store a tied weight twice, or as the head alone, which stays as it is.
    holds = tied_embedding(model) is not None and keys[0].endswith(".weight")
    return {keys[0]: [key for key in keys[1:] if key]} if holds else {}
