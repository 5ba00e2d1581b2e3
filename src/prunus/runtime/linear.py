"""The modules of a packed model: packed linears and embeddings, and dense linears with a kernel.

An embedding and the output head that is tied to it are one weight, which is stored once. The
embedding expands only the rows of the tokens that are looked up. The head multiplies straight from
the packed weight, as any other linear does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from prunus.hardware.memory import release_file_pages
from prunus.runtime.forms import check, expand
from prunus.runtime.operators import (
    as_arguments,
    is_plain,
    look_up,
    packed_embedding,
    packed_linear,
    run_dense,
    run_packed,
    warn_of_expansion,
)
from prunus.runtime.weight import Packed, from_tensors, layout_of, named_tensors


class PackedLinear(nn.Module):
    """Replaces an `nn.Linear` whose weight is packed, as a bitmap or quantised.

    Its state is what `docs/reference/packed-format.md` describes: the tensors of the weight under
    their names there. They are buffers and not parameters: packed weights are not trained, but a
    gradient passes through to the inputs.

    Args:
        packed: The weight. Its tensors may be on the meta device, to be filled from a loaded state;
            then `prepare` must be called before the module runs.
        bias: (O,), or None.
        stored: The declared number of stored entries of a bitmap; see `forms.check`.

    Attributes:
        out_features: O.
        in_features: I.
        layout: Codes and rows per chunk of a quantised weight; None for a bitmap.
        prepared: What `forms.check` returned; None before `prepare`.

    Raises:
        ValueError: The parts of the weight do not fit each other.
    """

    #: The first tensor of the weight: values of a bitmap, or bit planes. It is not the weight.
    weight: torch.Tensor
    #: (O,), or None.
    bias: nn.Parameter | None

    def __init__(
        self, packed: Packed, bias: torch.Tensor | None = None, stored: int | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.layout = layout_of(packed)
        self._stored = stored
        parts = named_tensors("", packed)
        self._names = tuple(parts)
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)
        self.register_buffer("prepared", None, persistent=False)
        # The dense weight on a device without kernels; see `dense_on_device`.
        self._expanded: torch.Tensor | None = None
        parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", parameter)
        if self.weight.device.type != "meta":
            self.prepare()

    @property
    def packed(self) -> Packed:
        """The weight as it is stored."""
        # The buffers are read straight from their dict: the attribute lookup of a module costs as
        # much as a small product.
        return from_tensors((self.out_features, self.in_features), self._buffers, self.layout)

    def prepare(self) -> None:
        """Check a state that was loaded, before the module runs; see `forms.check`.

        Raises:
            ValueError: The parts of the weight do not fit each other.
        """
        self.prepared = check(self.packed, self._stored)
        self._expanded = None
        if self.has_lines:  # the bit planes are read again only when the state is saved
            release_file_pages(self.weight)

    @property
    def has_lines(self) -> bool:
        """Whether products read lines, the form in memory of a quantised weight on the CPU.

        The bit planes are then only needed to save the state. `kernels/lines.h` explains lines.
        """
        return self.prepared is not None and self.prepared.dtype is torch.uint8

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the dense weight (O, I); see `forms.expand`."""
        return expand(self.packed, dtype, self.prepared)

    def dense_on_device(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense weight on a device without kernels, kept until the module moves."""
        warn_of_expansion(self.weight.device)
        if self._expanded is None or self._expanded.dtype != dtype:
            with torch.no_grad():
                self._expanded = self.dense(dtype)
        return self._expanded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., I) to (..., O) in the dtype of the inputs.

        Raises:
            ValueError: The inputs have another width.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected inputs of width {self.in_features}, got {tuple(x.shape)}")
        prepared, bias = self._buffers["prepared"], self._parameters["bias"]
        if x.is_cuda and not torch.compiler.is_compiling():
            return functional.linear(x, self.dense_on_device(x.dtype), bias)
        # A kernel records no gradient, so a bias in training takes the operator.
        if is_plain(x) and (bias is None or not (bias.requires_grad and torch.is_grad_enabled())):
            return run_packed(x, self.packed, prepared, bias)
        return packed_linear(x, *as_arguments(self.packed), prepared, bias)

    def extra_repr(self) -> str:
        """What `print` says of the module, as of an `nn.Linear`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Let `.to(device)` move everything, but `.half()` and the like change the bias alone."""
        stored = {id(self._buffers[name]) for name in self._names}
        self._expanded = None
        before = self.weight.device.type

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return (
                tensor.to(result.device)
                if id(tensor) in stored and result.dtype != tensor.dtype
                else result
            )

        result = super()._apply(moved, recurse)
        now = self.weight.device.type
        if self.layout is not None and now != before and "meta" not in (now, before):
            self.prepare()  # lines are for the CPU only
        return result


class DenseLinear(nn.Linear):
    """An `nn.Linear` that multiplies a few bfloat16 tokens with the kernel instead of torch.

    It is an `nn.Linear` in every other respect: the same parameters and state, and it can be tied,
    trained and adapted.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out). A graph, as of torch.compile, has torch's own linear."""
        weight = self.weight
        if is_plain(input) and not (weight.requires_grad and torch.is_grad_enabled()):
            return run_dense(input, weight, self.bias)
        return functional.linear(input, weight, self.bias)


def plain_linear(
    weight_OI: torch.Tensor, bias: torch.Tensor | None, kind: type[nn.Linear] = nn.Linear
) -> nn.Linear:
    """Return a linear with these parameters, of the class `kind`.

    A weight that is a plain tensor becomes a parameter that is not trained.
    """
    rows, columns = weight_OI.shape
    linear = kind(columns, rows, bias=False, device="meta")
    is_parameter = isinstance(weight_OI, nn.Parameter)
    linear.weight = weight_OI if is_parameter else nn.Parameter(weight_OI, requires_grad=False)
    linear.register_parameter("bias", bias)  # type: ignore[arg-type]
    return linear


def use_dense_kernel(model: nn.Module) -> int:
    """Turn every `nn.Linear` of a model into a `DenseLinear` with the same parameters, in place.

    Tied weights stay tied.

    Returns:
        The number of linears that were turned.
    """
    linears = [
        (name, module) for name, module in model.named_modules() if type(module) is nn.Linear
    ]
    for name, module in linears:
        model.set_submodule(name, plain_linear(module.weight, module.bias, DenseLinear))
    return len(linears)


class PackedEmbedding(PackedLinear):
    """Replaces an `nn.Embedding` whose weight is packed; its state is that of a `PackedLinear`.

    Args:
        packed: The weight (vocabulary, width).
        dense: The embedding that it replaces; see `prunus.model.embeddings`. Its weight may be on
            the meta device, and tells the dtype of the rows that are looked up.
        stored: As for `PackedLinear`.

    Attributes:
        num_embeddings: Size of the vocabulary.
        embedding_dim: Width.
        dtype: The dtype of the rows that are looked up.
    """

    def __init__(self, packed: Packed, dense: nn.Embedding, stored: int | None = None) -> None:
        super().__init__(packed, stored=stored)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.dtype = dense.weight.dtype
        # Inside a tuple it is not a submodule, so that it is neither saved nor counted.
        self._dense = (dense,)
        if (scale := getattr(dense, "scalar_embed_scale", None)) is not None:
            dense.embed_scale = torch.tensor(scale, device="cpu")  # no file holds this buffer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map token ids (...) to rows (..., width)."""
        rows = self._rows(input)
        # Some families scale embeddings, such as Gemma.
        scale = getattr(self._dense[0], "embed_scale", None)
        if isinstance(scale, torch.Tensor):
            scale = scale.to(self.dtype)
        return rows if scale is None else rows * scale

    def _rows(self, input: torch.Tensor) -> torch.Tensor:
        """Rows of the weight (..., width), not yet scaled."""
        prepared = self._buffers["prepared"]
        if torch.compiler.is_compiling() or input.is_meta:
            return packed_embedding(input, *as_arguments(self.packed), prepared, self.dtype)
        if input.is_cuda:
            return functional.embedding(input, self.dense_on_device(self.dtype))
        return look_up(input, self.packed, prepared, self.dtype)

    def table(self, weight: nn.Parameter) -> nn.Embedding:
        """The embedding that this one has replaced, with a dense weight."""
        self._dense[0].weight = weight
        return self._dense[0]


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
        return PackedLinear.forward(self.embedding, x)


def pack_module(model: Any, name: str, packed: Packed, stored: int | None) -> None:
    """Replace a linear of a transformers model by a packed one, or an embedding and its tied head.

    Args:
        model: A transformers model, which is changed.
        name: Path of the linear or embedding in it.
        packed: The weight; see `PackedLinear`.
        stored: The declared number of stored entries of a bitmap; None leaves it unchecked.

    Raises:
        ValueError: The head that is tied to an embedding is not a plain linear.
    """
    dense = model.get_submodule(name)
    if not isinstance(dense, nn.Embedding):
        model.set_submodule(name, PackedLinear(packed, dense.bias, stored))
        return
    embedding = PackedEmbedding(packed, dense, stored)
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


def unpack_module(model: Any, name: str, dtype: torch.dtype | None) -> None:
    """Replace a packed linear by a dense one, or a packed embedding and its head.

    An embedding and its head get one dense weight.

    Args:
        model: A transformers model, which is changed.
        name: Path of the packed linear or embedding in it.
        dtype: The dtype of the dense weight; None is that of the embedding's rows, or of a bitmap's
            entries, or bfloat16 for integers.
    """
    packed = model.get_submodule(name)
    if not isinstance(packed, PackedEmbedding):
        dense = nn.Parameter(packed.dense(dtype))
        model.set_submodule(name, plain_linear(dense, packed.bias))
        return
    weight = nn.Parameter(packed.dense(dtype or packed.dtype))
    for other, module in list(model.named_modules()):
        if isinstance(module, TiedHead) and module.embedding is packed:
            model.set_submodule(other, plain_linear(weight, None))
    model.set_submodule(name, packed.table(weight))
