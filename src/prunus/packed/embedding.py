"""A packed embedding, and the output head that is tied to it.

The two are one weight, stored once. Looked up, only the rows of the tokens at hand are expanded; the head multiplies
straight from the packed weight as any other linear does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from prunus.packed.bitmap import expand, expand_rows
from prunus.packed.linear import BitmapLinear
from prunus.packed.operators import as_packed_weight
from prunus.packed.weight import PackedWeight

__all__ = ["BitmapEmbedding", "TiedHead", "pack_tied_embedding", "unpack_tied_embedding"]


def _look_up(
    ids: torch.Tensor, packed: PackedWeight, offsets: torch.Tensor | None, dtype: torch.dtype
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
    """Rows of a packed weight as a torch operator, so that compile and export see them as one node."""
    packed = as_packed_weight((num_embeddings, embedding_dim), values, mask, scales, coding)
    return _look_up(ids, packed, offsets, dtype)


@bitmap_embedding.register_fake
def _(
    ids: torch.Tensor, _tokens: int, width: int, values: torch.Tensor, *rest: Any
) -> torch.Tensor:
    return values.new_empty(*ids.shape, width, dtype=rest[-1])


class BitmapEmbedding(BitmapLinear):
    """Takes the place of an `nn.Embedding` whose weight is packed; its state is that of a `BitmapLinear`.

    Args:
        packed: the weight (tokens of the vocabulary, width).
        dtype: of the rows that are looked up: the model's, which int8 values do not tell.
    """

    def __init__(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__(packed)
        self.num_embeddings, self.embedding_dim, self.dtype = *packed.shape, dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids (...) -> (..., width)."""
        packed, offsets = self.packed, self._buffers["row_offsets"]
        if not torch.compiler.is_compiling() and not input.is_meta:
            return _look_up(input, packed, offsets, self.dtype)
        coding = list(packed.coding or ())
        return bitmap_embedding(input, *packed.shape, *packed[1:4], coding, offsets, self.dtype)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> logits (..., tokens of the vocabulary)."""
        return super().forward(x)


class TiedHead(nn.Module):
    """The output head whose weight is a packed embedding's. It has no state of its own."""

    def __init__(self, embedding: BitmapEmbedding) -> None:
        super().__init__()
        self._embedding = (
            embedding,
        )  # in a tuple, so that it is no submodule and is not saved twice
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings

    @property
    def embedding(self) -> BitmapEmbedding:
        """Whose weight it is."""
        return self._embedding[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> logits (..., tokens of the vocabulary)."""
        return self.embedding.project(x)


def pack_tied_embedding(model: Any, name: str, packed: PackedWeight) -> None:
    """Put a packed weight in the place of the embedding `name` of a transformers model, and of the head tied to it.

    Args:
        packed: its tensors may be on the meta device, see `BitmapLinear`.

    Raises:
        ValueError: a head is tied to the embedding that is no plain linear.
    """
    embedding = BitmapEmbedding(packed, model.get_submodule(name).weight.dtype)
    # Which weights will be tied is known before they are.
    ties = getattr(model, "all_tied_weights_keys", {})
    for target in [target for target, source in ties.items() if source == f"{name}.weight"]:
        head = target.removesuffix(".weight")
        module = model.get_submodule(head)
        if type(module) is not nn.Linear or module.bias is not None:
            raise ValueError(f"{head}, tied to the packed {name}, is no plain linear")
        model.set_submodule(head, TiedHead(embedding))
        del ties[target]
    model.set_submodule(name, embedding)


def unpack_tied_embedding(model: Any, name: str, dtype: torch.dtype | None = None) -> None:
    """Make the packed embedding `name` and its head ordinary modules that share a dense weight."""
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
