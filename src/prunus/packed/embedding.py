"""A packed embedding, and the output head that is tied to it.

Both are one weight, which is stored once. The embedding expands only the rows of the tokens that
are looked up. The head multiplies straight from the packed weight, as any other linear does.
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
    """Return rows of a packed weight, as a torch operator.

    torch.compile and torch.export see an operator as one node.
    """
    packed = as_packed_weight((num_embeddings, embedding_dim), values, mask, scales, coding)
    return _look_up(ids, packed, offsets, dtype)


@bitmap_embedding.register_fake
def _(
    ids: torch.Tensor, _tokens: int, width: int, values: torch.Tensor, *rest: Any
) -> torch.Tensor:
    return values.new_empty(*ids.shape, width, dtype=rest[-1])


class BitmapEmbedding(BitmapLinear):
    """Replaces an `nn.Embedding` whose weight is packed; its state is that of a `BitmapLinear`.

    Args:
        packed: the weight (vocabulary, width).
        dtype: dtype of the rows that are looked up. It is the model's dtype, which int8 values do
            not tell.
    """

    def __init__(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__(packed)
        self.num_embeddings, self.embedding_dim, self.dtype = *packed.shape, dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map token ids (...) to rows (..., width)."""
        packed, offsets = self.packed, self._buffers["row_offsets"]
        if not torch.compiler.is_compiling() and not input.is_meta:
            return _look_up(input, packed, offsets, self.dtype)
        coding = list(packed.coding or ())
        return bitmap_embedding(input, *packed.shape, *packed[1:4], coding, offsets, self.dtype)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Map hidden states (..., width) to logits (..., vocabulary)."""
        return super().forward(x)


class TiedHead(nn.Module):
    """The output head that uses the weight of a packed embedding. It has no state of its own."""

    def __init__(self, embedding: BitmapEmbedding) -> None:
        super().__init__()
        # Inside a tuple the embedding is not a submodule, so that it is not saved twice.
        self._embedding = (embedding,)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings

    @property
    def embedding(self) -> BitmapEmbedding:
        """The embedding that owns the weight."""
        return self._embedding[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map hidden states (..., width) to logits (..., vocabulary)."""
        return self.embedding.project(x)


def pack_tied_embedding(model: Any, name: str, packed: PackedWeight) -> None:
    """Replace the embedding `name` of a transformers model, and the head tied to it, by packed
    ones.

    Args:
        model: a transformers model.
        name: path of the embedding.
        packed: the weight; its tensors may be on the meta device, see `BitmapLinear`.

    Raises:
        ValueError: the head that is tied to the embedding is not a plain linear.
    """
    embedding = BitmapEmbedding(packed, model.get_submodule(name).weight.dtype)
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
