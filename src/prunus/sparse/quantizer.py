"""How transformers loads, saves and expands a packed checkpoint: its public interface for quantizers.

Imported while transformers is itself being imported (see `register`): only modules that are loaded by then
may be imported at the head of this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from prunus.sparse.decoding import use_fast_decoding
from prunus.sparse.description import FORMAT_VERSION, METHOD, Description, StoredTensor
from prunus.sparse.embedding import BitmapEmbedding, pack_tied_embedding, unpack_tied_embedding
from prunus.sparse.linear import BitmapLinear, use_dense_kernel

__all__ = ["PrunusConfig", "PrunusQuantizer", "register_with_transformers"]

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I64": torch.int64,
}


class PrunusConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint; see `description.Description`.

    Raises:
        ValueError: the content is not one that this version of prunus can read.
    """

    def __init__(
        self,
        version: int = FORMAT_VERSION,
        values: str | None = None,
        linears: dict[str, list[int]] | None = None,
        **_: Any,
    ) -> None:
        content = {"quant_method": METHOD, "version": version, "values": values, "linears": linears}
        self.__dict__.update(Description.from_dict(content).to_dict())

    @property
    def description(self) -> Description:
        """The same, checked and typed."""
        return Description.from_dict(self.__dict__)


class PrunusQuantizer(HfQuantizer):
    """Puts packed linears in the place of dense ones before weights are loaded, and checks them afterwards."""

    requires_calibration = True  # only checkpoints that are packed already: `prunus pack` makes them

    def update_attn_implementation(self, config: Any) -> Any:
        """Take away the refusal (see `description.REFUSAL`); of the hooks, those that see the configuration."""
        return _without_refusal(config)

    def update_tp_plan(self, config: Any) -> Any:
        """The same in earlier versions of transformers."""
        return _without_refusal(config)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        described = self.quantization_config.description
        if checkpoint_files:
            described.check_tensors(_headers(checkpoint_files))
        names = {}
        for name, shape in described.linears.items():
            found = _find_linear(model, name)
            linear = model.get_submodule(found)
            if tuple(linear.weight.shape) != (shape.out_features, shape.in_features):
                raise ValueError(
                    f"{name} is {shape.out_features} x {shape.in_features} in the packed checkpoint, but the model "
                    f"that config.json describes has {' x '.join(map(str, linear.weight.shape))}"
                )
            tensors = described.tensors(name).items()
            on_meta = {part: torch.empty(t.shape, dtype=t.dtype, device="meta") for part, t in tensors}
            packed = described.weight(name, on_meta)
            if isinstance(linear, nn.Embedding):
                pack_tied_embedding(model, found, packed)
            else:
                model.set_submodule(found, BitmapLinear(packed, linear.bias))
            names[found] = shape
        # Saved again, the checkpoint has the names of this model's own parameters.
        renamed = Description(described.values, names, described.version)
        self.quantization_config.linears = renamed.to_dict()["linears"]
        use_dense_kernel(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        linears = self.quantization_config.description.linears
        for name, module in model.named_modules():
            if isinstance(module, BitmapLinear):
                if module.weight.device.type == "meta":
                    raise ValueError(f"{name} was not loaded: packed checkpoints cannot be offloaded to disk")
                try:
                    module.prepare(linears[name].stored)
                except ValueError as fault:
                    raise ValueError(f"{name} is damaged: {fault}") from fault
        use_fast_decoding(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # A model that was saved once has it as a name in its configuration.
        stored: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, BitmapEmbedding):
                unpack_tied_embedding(model, name, stored)
            elif isinstance(module, BitmapLinear):
                has_bias = module.bias is not None
                dense = nn.Linear(module.in_features, module.out_features, has_bias, device="meta")
                dense.weight = nn.Parameter(module.dense(stored))
                dense.bias = module.bias  # type: ignore[assignment]
                model.set_submodule(name, dense)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True  # the products are torch operators that compile sees as one node each

    @property
    def is_trainable(self) -> bool:
        return False


def register_with_transformers() -> None:
    """Enter the quantizer in transformers' tables, once."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(PrunusConfig)
        register_quantizer(METHOD)(PrunusQuantizer)


def _without_refusal(config: Any) -> Any:
    if getattr(config, "transformers_weights", None) is not None:
        del config.transformers_weights
    return config


def _headers(files: Sequence[str]) -> dict[str, StoredTensor]:
    """Shapes and dtypes of all tensors of the shards, from their headers."""
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    piece = handle.get_slice(name)
                    dtype = _DTYPES.get(piece.get_dtype(), torch.float64)
                    found[name] = StoredTensor(tuple(piece.get_shape()), dtype)
        except (SafetensorError, OSError) as fault:
            raise ValueError(
                f"{file} is not a whole safetensors file: {fault}. Download or copy it again"
            ) from fault
    return found


def _find_linear(model: Any, name: str) -> str:
    """The path of a packed linear in this model, which may be the one saved, its body alone, or a body with a head."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            module = model.get_submodule(candidate)
        except AttributeError:
            continue
        if type(module) in (nn.Linear, nn.Embedding):
            return candidate
        raise ValueError(f"the packed linear {name!r} is a {type(module).__name__} in this model")
    raise ValueError(
        f"the model that config.json describes has no linear {name!r}; config and weights do not belong together"
    )
