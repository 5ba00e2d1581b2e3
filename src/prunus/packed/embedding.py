"""A packed embedding, and the output head that is tied to it.

Both are one weight, which is stored once. The embedding expands only the rows of the tokens that
are looked up. The head multiplies straight from the packed weight, as any other linear does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from prunus.packed.forms import Packed, expand, expand_rows
from prunus.packed.linear import BitmapLinear, PackedLinear, QuantizedLinear
from prunus.packed.operators import as_packed_weight, as_quantized_weight, codes_as_numbers
from prunus.packed.weight import QuantizedWeight

__all__ = [
    "BitmapEmbedding",
    "PackedEmbedding",
    "QuantizedEmbedding",
    "TiedHead",
    "pack_tied_embedding",
    "unpack_tied_embedding",
]


def _look_up(
    ids: torch.Tensor, packed: Packed, offsets: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    if ids.is_cpu:
        return expand_rows(packed, ids, offsets, dtype)
    return functional.embedding(ids, expand(packed, dtype, offsets))


@torch.library.custom_op("prunus::bitmap_embedding", mutates_args=())
def bitmap_embedding(
    ids: torch.Tensor,
    num_embeddings: int,
    embedding_dim: int,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scales: torch.Tensor | None,
    coding: list[torch.Tensor],
    offsets: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return rows of a bitmap, as a torch operator.

    torch.compile and torch.export see an operator as one node.
    """
    packed = as_packed_weight((num_embeddings, embedding_dim), values, mask, scales, coding)
    return _look_up(ids, packed, offsets, dtype)


@torch.library.custom_op("prunus::quantized_embedding", mutates_args=())
def quantized_embedding(
    ids: torch.Tensor,
    num_embeddings: int,
    embedding_dim: int,
    data: torch.Tensor,
    classes: torch.Tensor,
    steps: torch.Tensor,
    scales: torch.Tensor,
    codes: list[int],
    rows_per_chunk: int,
    offsets: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return rows of a quantised weight, as a torch operator."""
    shape = (num_embeddings, embedding_dim)
    weight = as_quantized_weight(shape, data, classes, steps, scales, codes, rows_per_chunk)
    return _look_up(ids, weight, offsets, dtype)


@bitmap_embedding.register_fake
@quantized_embedding.register_fake
def _(ids: torch.Tensor, _tokens: int, width: int, first: torch.Tensor, *rest: Any) -> torch.Tensor:
    return first.new_empty(*ids.shape, width, dtype=rest[-1])


class PackedEmbedding(PackedLinear):
    """Replaces an `nn.Embedding` whose weight is packed; its state is that of a `PackedLinear`.

    Args:
        packed: the weight (vocabulary, width).
        dtype: dtype of the rows that are looked up. It is the model's dtype, which integers do not
            tell.
    """

    def __init__(self, packed: Packed, dtype: torch.dtype) -> None:
        super().__init__(packed)
        self.num_embeddings, self.embedding_dim, self.dtype = *packed.shape, dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map token ids (...) to rows (..., width)."""
        if input.is_cuda and not torch.compiler.is_compiling():
            return functional.embedding(input, self.dense_on_device(self.dtype))
        if not torch.compiler.is_compiling() and not input.is_meta:
            return _look_up(input, self.packed, self._buffers["offsets"], self.dtype)
        return self._look_up_operator(input)

    def _look_up_operator(self, ids: torch.Tensor) -> torch.Tensor:
        """Do the same as a torch operator."""
        raise NotImplementedError

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Map hidden states (..., width) to logits (..., vocabulary)."""
        return super().forward(x)


class BitmapEmbedding(PackedEmbedding, BitmapLinear):
    """An embedding whose weight is a bitmap."""

    def _look_up_operator(self, ids: torch.Tensor) -> torch.Tensor:
        packed = self.packed
        coding = list(packed.coding or ())
        return bitmap_embedding(ids, *packed.shape, *packed[1:4], coding, self.offsets, self.dtype)


class QuantizedEmbedding(PackedEmbedding, QuantizedLinear):
    """An embedding whose weight is quantised."""

    def _look_up_operator(self, ids: torch.Tensor) -> torch.Tensor:
        packed = self.packed
        codes, step = codes_as_numbers(packed.codes), packed.rows_per_chunk
        return quantized_embedding(
            ids, *packed.shape, *packed[1:5], codes, step, self.offsets, self.dtype
        )


class TiedHead(nn.Module):
    """The output head that uses the weight of a packed embedding. It has no state of its own."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        # Inside a tuple the embedding is not a submodule, so that it is not saved twice.
        self._embedding = (embedding,)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings

    @property
    def embedding(self) -> PackedEmbedding:
        """The embedding that owns the weight."""
        return self._embedding[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map hidden states (..., width) to logits (..., vocabulary)."""
        return self.embedding.project(x)


def pack_tied_embedding(model: Any, name: str, packed: Packed) -> None:
    """Replace the embedding `name` of a transformers model, and the head tied to it, by packed
    ones.

    Args:
        model: a transformers model.
        name: path of the embedding.
        packed: the weight; its tensors may be on the meta device, see `PackedLinear`.

    Raises:
        ValueError: the head that is tied to the embedding is not a plain linear.
    """
    kind = QuantizedEmbedding if isinstance(packed, QuantizedWeight) else BitmapEmbedding
    embedding: PackedEmbedding = kind(packed, model.get_submodule(name).weight.dtype)
    # transformers knows which weights it will tie before it ties them.
    ties = getattr(model, "all_tied_weights_keys", {})
    for target in [target for target, source in ties.items() if source == f"{name}.weight"]:
        head = target.removesuffix(".weight")
        module = model.get_submodule(head)
        if type(module) is not nn.Linear or module.bias is not None:
            raise ValueError(f"{head}, tied to the packed {name}, is not a plain linear")
        model.set_submodule(head, TiedHead(embedding))
        del ties[target]
    model.set_submodule(name, embedding)


def unpack_tied_embedding(model: Any, name: str, dtype: torch.dtype | None = None) -> None:
    """Replace the packed embedding `name` and its head by modules with one dense weight."""
    packed = model.get_submodule(name)
    weight = nn.Parameter(packed.dense(dtype or packed.dtype))
    embedding = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    embedding.weight = weight
    for other, module in list(model.named_modules()):
        if isinstance(module, TiedHead) and module.embedding is packed:
            head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            head.weight = weight
            model.set_submodule(other, head)
    model.set_submodule(name, embedding)
