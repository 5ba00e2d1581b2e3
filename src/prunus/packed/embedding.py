"""A packed embedding, and the output head that is tied to it.

Both are one weight, which is stored once. The embedding expands only the rows of the tokens that
are looked up. The head multiplies straight from the packed weight, as any other linear does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from prunus.packed.linear import PackedLinear, plain_linear
from prunus.packed.operators import as_arguments, look_up, packed_embedding
from prunus.packed.weight import Packed


class PackedEmbedding(PackedLinear):
    """Replaces an `nn.Embedding` whose weight is packed; its state is that of a `PackedLinear`.

    Args:
        packed: the weight (vocabulary, width).
        dtype: dtype of the rows that are looked up. It is the model's dtype, which integers do not
            tell.
        stored: see `PackedLinear`.
    """

    def __init__(self, packed: Packed, dtype: torch.dtype, stored: int | None = None) -> None:
        super().__init__(packed, stored=stored)
        self.num_embeddings, self.embedding_dim, self.dtype = *packed.shape, dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map token ids (...) to rows (..., width)."""
        offsets = self._buffers["offsets"]
        if torch.compiler.is_compiling() or input.is_meta:
            return packed_embedding(input, *as_arguments(self.packed), offsets, self.dtype)
        if input.is_cuda:
            return functional.embedding(input, self.dense_on_device(self.dtype))
        return look_up(input, self.packed, offsets, self.dtype)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Map hidden states (..., width) to logits (..., vocabulary)."""
        return super().forward(x)


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


def pack_module(model: Any, name: str, packed: Packed, stored: int | None = None) -> None:
    """Replace a linear of a transformers model by a packed one, or an embedding and the head that
    is tied to it.

    Args:
        packed: the weight; its tensors may be on the meta device, see `PackedLinear`.
        stored: see `PackedLinear`.
    """
    dense = model.get_submodule(name)
    if not isinstance(dense, nn.Embedding):
        model.set_submodule(name, PackedLinear(packed, dense.bias, stored))
        return
    embedding = PackedEmbedding(packed, dense.weight.dtype, stored)
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


def unpack_module(model: Any, name: str, dtype: torch.dtype | None = None) -> None:
    """Replace a packed linear by a dense one, or a packed embedding and its head by modules with
    one dense weight.

    Args:
        dtype: of the dense weight; None is that of the rows of an embedding, and of the values of a
            linear, see `PackedLinear.dense`.
    """
    packed = model.get_submodule(name)
    if not isinstance(packed, PackedEmbedding):
        dense = nn.Parameter(packed.dense(dtype))
        model.set_submodule(name, plain_linear(dense, packed.bias))
        return
    weight = nn.Parameter(packed.dense(dtype or packed.dtype))
    embedding = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    embedding.weight = weight
    for other, module in list(model.named_modules()):
        if isinstance(module, TiedHead) and module.embedding is packed:
            model.set_submodule(other, plain_linear(weight, None))
    model.set_submodule(name, embedding)
