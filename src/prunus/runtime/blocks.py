"""Blocks of known families that decode a token in one call of a kernel.

Between the products of a block, transformers runs some fifty small torch operations, which take as
long for one token as half of the products. The kernel computes all of it: norms, rotary embeddings,
attention, and the gate. It rounds where the modules round. Keys and values stay in the model's own
`DynamicCache`, with room behind them, so that a new token is written in place.

A block takes the kernel for one new token in each sequence of a batch. For all other inputs, and
wherever a part of the block is not as it was written (hooks, adapters, gradients, other attention),
its modules run as before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from prunus.runtime.kernels.interface import Block, Matrix, Tokens, describe
from prunus.runtime.linear import DenseLinear, PackedLinear
from prunus.runtime.operators import fit_kernel, loaded_kernels, on_reference_path
from prunus.runtime.weight import PackedWeight, QuantizedWeight

# Module of transformers.models and class of a block -> how its norms end, as `PrunusBlock` of
# kernels.h numbers it.
_FAMILIES = {
    "llama.modeling_llama.LlamaDecoderLayer": 0,
    "mistral.modeling_mistral.MistralDecoderLayer": 0,
    "qwen2.modeling_qwen2.Qwen2DecoderLayer": 0,
    "qwen3.modeling_qwen3.Qwen3DecoderLayer": 0,
    "gemma3.modeling_gemma3.Gemma3DecoderLayer": 1,
}
_HOME = "transformers.models."
# Likewise, of an activation.
_ACTIVATIONS = {"SiLU": 0, "SiLUActivation": 0, "GELUTanh": 1}
# Attention functions whose result the kernel gives: torch's, and that of `fast_decoding`.
_SDPA = ("sdpa", "prunus_sdpa")
# The newer and the older name of one argument.
_CACHES = ("cache", "past_key_values")
# Arguments that the kernel is given, or that a block does not compute with. `generate` hands the
# tokenizer down to every block, where a program gives it one to find stop strings.
_PLAIN_ARGUMENTS = {
    *_CACHES,
    "attention_mask",
    "cache_position",
    "position_embeddings",
    "position_ids",
    "tokenizer",
    "use_cache",
}
# Sequences of a batch that the kernel computes at a time.
_MOST_SEQUENCES = 16
# Attribute of a cache's layer that holds its `_Room`.
_ROOM = "_prunus_room"
# Positions of room for new tokens, at least.
_MIN_ROOM = 256


def use_block_kernel(model: nn.Module) -> None:
    """Let the blocks of a model decode with the kernel, in place.

    Blocks of families that are not in `_FAMILIES` stay as they are.
    """
    for module in model.modules():
        kind = type(module)
        form = _FAMILIES.get(f"{kind.__module__}.{kind.__name__}".removeprefix(_HOME))
        if form is not None and kind.__module__.startswith(_HOME):
            module.forward = _Decoder(module, form)


class _Decoder:
    """The forward of a block: the kernel where it can be used, or else the modules of the block.

    It is copied with its block. A copy describes the weights of its own block anew.

    Attributes:
        block: The block.
        form: How its norms end; see `_FAMILIES`.
        plan: The block as the kernel reads it; None before the first token, and after a change.
    """

    def __init__(self, block: nn.Module, form: int) -> None:
        self.block: Any = block
        self.form = form
        self.plan: _Plan | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"plan": None}

    def __call__(self, hidden_states: torch.Tensor, *others: Any, **named: Any) -> Any:
        output = None if others else self._decode(hidden_states, named)
        if output is None:
            return type(self.block).forward(self.block, hidden_states, *others, **named)
        return output

    def _decode(self, x: torch.Tensor, named: Mapping[str, Any]) -> torch.Tensor | None:
        """Return the output (batch, 1, width), or None where the kernel does not compute it."""
        if (
            x.dim() != 3
            or x.shape[1] != 1
            or not 0 < x.shape[0] <= _MOST_SEQUENCES
            or torch.is_grad_enabled()
            or self.block.training
            or on_reference_path()
            or not fit_kernel(x)
            or (compiled := loaded_kernels()) is None
        ):
            return None
        plan = self.plan
        if plan is None or plan.dtype != x.dtype or not plan.holds():
            try:
                plan = self.plan = _Plan(self.block, self.form, x.dtype, compiled.has_bfloat16)
            except _OtherBlockError:
                self.plan = None
                return None
        layer = _cache_of(plan, x, named)
        if layer is None:
            return None
        mask = named.get("attention_mask")
        cos, sin = named["position_embeddings"]
        keys, values = _extend(layer)
        tokens = Tokens(
            x.shape[0],
            keys.shape[2],
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride(1),
            cos.data_ptr(),
            sin.data_ptr(),
            plan.dim if cos.shape[0] > 1 else 0,
            None if mask is None else mask.data_ptr(),
        )
        return compiled.block(plan.described, tokens, x)


class _OtherBlockError(Exception):
    """The kernel does not compute this block as it is now."""


class _Plan:
    """A block as the kernel reads it, and what must not change as long as it is used.

    Attributes:
        dtype: The dtype of activations.
        attention: The attention module.
        index: Position of the block, which numbers its layer of the cache.
        window: Tokens that the attention sees; None for all.
        dim: Channels of a head.
        key_heads: Number of key-value heads.
        described: The block for the kernel. It holds addresses of tensors that this object keeps.

    Raises:
        _OtherBlockError: The kernel does not compute this block as it is.
    """

    def __init__(self, block: Any, form: int, dtype: torch.dtype, has_dense: bool) -> None:
        self.dtype = dtype
        self._has_dense = has_dense
        # What `described` points to.
        self._referenced: list[Any] = []
        # (children of a module, name, child) and (tensors of a module, name, tensor, its address),
        # which `holds` compares.
        self._modules: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._tensors: list[tuple[dict[str, Any], str, torch.Tensor, int]] = []
        self._epsilons: set[float] = set()
        attention, feed = self._child(block, "self_attn"), self._child(block, "mlp")
        activation = _ACTIVATIONS.get(type(feed.act_fn).__name__)
        if activation is None or getattr(attention, "attn_logit_softcapping", None) is not None:
            raise _OtherBlockError
        self.attention = attention
        self.index = attention.layer_idx
        self.window: int | None = getattr(attention, "sliding_window", None)
        self.dim: int = attention.head_dim
        query, key, value, output = (self._matrix(attention, f"{name}_proj") for name in "qkvo")
        gate, up, down = (self._matrix(feed, f"{name}_proj") for name in ("gate", "up", "down"))
        self.key_heads: int = attention.k_proj.out_features // self.dim
        # Gemma has four norms of hidden states, and calls the second one as others call the last.
        has_four = "pre_feedforward_layernorm" in block._modules
        before_feed = "pre_feedforward_layernorm" if has_four else "post_attention_layernorm"
        self.described = Block(
            attention.q_proj.in_features,
            attention.q_proj.out_features // self.dim,
            self.key_heads,
            self.dim,
            feed.up_proj.out_features,
            *(query, key, value, output, gate, up, down),
            self._norm(block, "input_layernorm"),
            self._norm(block, before_feed),
            self._norm(attention, "q_norm"),
            self._norm(attention, "k_norm"),
            self._norm(block, "post_attention_layernorm") if has_four else None,
            self._norm(block, "post_feedforward_layernorm") if has_four else None,
            max(self._epsilons),
            attention.scaling,
            form,
            activation,
        )
        if len(self._epsilons) != 1 or not self.holds():
            raise _OtherBlockError

    def _child(self, parent: nn.Module, name: str) -> Any:
        """A child of a module; it must stay the same object."""
        child = parent._modules[name]
        assert child is not None
        self._modules.append((parent._modules, name, child))
        return child

    def _address(self, entries: dict[str, Any], name: str) -> int | None:
        """Return where a tensor of a module is, and None if there is none; it must stay there."""
        tensor = entries.get(name)
        if tensor is None:
            return None
        if tensor.dtype.is_floating_point and tensor.dtype != self.dtype:
            raise _OtherBlockError
        self._tensors.append((entries, name, tensor, tensor.data_ptr()))
        return int(tensor.data_ptr())

    def _norm(self, parent: nn.Module, name: str) -> int | None:
        """Return where the weight of a norm is; None where there is no such norm."""
        if name not in parent._modules:
            return None
        norm = self._child(parent, name)
        self._epsilons.add(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
        return self._address(norm._parameters, "weight")

    def _matrix(self, parent: nn.Module, name: str) -> Matrix:
        """Describe a linear: a packed one, or a dense one in bfloat16 that has a kernel."""
        linear = self._child(parent, name)
        bias = self._address(linear._parameters, "bias")
        if type(linear) is PackedLinear and (linear.layout is None or linear.has_lines):
            self._address(linear._buffers, "prepared")
            packed, prepared = linear.packed, linear.prepared
        elif type(linear) is DenseLinear and self._has_dense and self.dtype == torch.bfloat16:
            self._address(linear._parameters, "weight")
            shape = (linear.out_features, linear.in_features)
            packed, prepared = PackedWeight(shape, linear.weight.detach().view(-1)), None
        else:
            raise _OtherBlockError
        described = describe(packed, prepared)
        self._referenced.append((packed, prepared, described))
        at = ctypes.addressof(described)
        forms = (None, at) if isinstance(packed, QuantizedWeight) else (at, None)
        return Matrix(*forms, bias)

    def holds(self) -> bool:
        """Whether the block is as it was described, and its modules would compute the same."""
        for entries, name, tensor, address in self._tensors:
            if entries.get(name) is not tensor or tensor.data_ptr() != address:
                return False
        for children, name, module in self._modules:
            if (
                children.get(name) is not module
                or module._forward_hooks
                or module._forward_pre_hooks
                or "forward" in module.__dict__
            ):
                return False
        return self.attention.config._attn_implementation in _SDPA


def _cache_of(plan: _Plan, x: torch.Tensor, named: Mapping[str, Any]) -> Any:
    """Return the cache of this block; None where the arguments are not those of plain decoding."""
    if any(
        name not in _PLAIN_ARGUMENTS and not (value is None or value is False)
        for name, value in named.items()
    ):
        return None
    cache: Any = next((named[name] for name in _CACHES if named.get(name) is not None), None)
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return None
    layer: Any = cache.layers[plan.index] if plan.index < len(cache.layers) else None
    sliding = type(layer) is DynamicSlidingWindowLayer and not getattr(layer, "record_past", False)
    if not (sliding or type(layer) is DynamicLayer) or not layer.is_initialized:
        return None
    keys, batch = layer.keys, x.shape[0]
    if keys.dtype is not x.dtype or keys.dim() != 4 or keys.shape != layer.values.shape:
        return None
    if keys.shape[:2] != (batch, plan.key_heads) or keys.shape[3] != plan.dim:
        return None
    length = keys.shape[2] + 1
    cos, sin = named.get("position_embeddings") or (x, x)
    if cos.shape != sin.shape or cos.shape not in ((1, 1, plan.dim), (batch, 1, plan.dim)):
        return None
    mask = named.get("attention_mask")
    if mask is None:
        # Without a mask, a window that is shorter than the sequence must be that of the cache.
        fits = plan.window is None or sliding or length <= plan.window
    else:
        fits = mask.dtype is torch.bool and mask.shape == (batch, 1, 1, length)
        fits = fits and mask.is_contiguous() and mask.is_cpu
    return layer if fits and fit_kernel(x, cos, sin) else None


class _Room:
    """Memory of the keys and values of a layer, (2, batch, heads, positions, dim), in part unused.

    There is room only as long as the layer holds the keys and values that it was given last.

    Attributes:
        keys: The keys that the layer was given last, a part of `memory`.
        values: The values, likewise.
        begin: The first position that the layer still holds.
        end: The position after the last one.
        positions: The positions that there is memory for.
        memory: As above.
    """

    def __init__(self, layer: Any) -> None:
        self.keys, self.values = layer.keys, layer.values
        batch, heads, length, dim = self.keys.shape
        self.begin, self.end = 0, length
        self.positions = length + max(_MIN_ROOM, length // 2)
        self.memory = self.keys.new_empty(2, batch, heads, self.positions, dim)
        self.memory[0, :, :, :length] = self.keys
        self.memory[1, :, :, :length] = self.values


def _extend(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values with a new last position, which is to be written.

    The layer gets what it keeps of them: with a sliding window, only the last positions.
    """
    room: _Room | None = layer.__dict__.get(_ROOM)
    if (
        room is None
        or room.keys is not layer.keys
        or room.values is not layer.values
        or room.end == room.positions
    ):
        room = _Room(layer)
        setattr(layer, _ROOM, room)
    keys_values = room.memory[:, :, :, room.begin : room.end + 1]
    keys, values = keys_values.unbind()
    room.end += 1
    room.keys, room.values = keys, values
    if type(layer) is DynamicSlidingWindowLayer:
        layer.cumulative_length += 1
        most = layer.sliding_window - 1
        if keys.shape[2] > most:
            room.begin = room.end - most
            room.keys, room.values = keys[:, :, -most:], values[:, :, -most:]
    layer.keys, layer.values = room.keys, room.values
    return keys, values
