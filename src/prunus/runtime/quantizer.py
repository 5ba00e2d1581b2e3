"""How transformers loads, saves and expands a packed checkpoint, by its interface for quantizers.

This file is imported while transformers itself is being imported (see `prunus_autoload.py`). Its
head may import only modules that are loaded by then.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from prunus.hardware.errors import naming
from prunus.model.embeddings import is_plain
from prunus.runtime.description import FORMAT_VERSION, METHOD, Description
from prunus.runtime.fast_decoding import use_fast_decoding
from prunus.runtime.linear import (
    PackedEmbedding,
    PackedLinear,
    TiedHead,
    pack_module,
    unpack_module,
    use_dense_kernel,
)

# Methods that prepare a model, and do not compute with it.
_PREPARING = re.compile(r"_*(init|reset|tie|get_|set_|resize)")
# Code that reads the weight of a child, and does not replace it.
_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\s*=[^=])")
# BLOOM reads these only with `slow_but_exact`, which repeats the rounding of several GPUs.
_NEVER_IN_PRACTICE = {("BloomAttention", "dense"), ("BloomMLP", "dense_4h_to_h")}


class PrunusConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint; see `description.Description`.

    Raises:
        ValueError: This version of prunus cannot read the content.
    """

    def __init__(
        self,
        version: int = FORMAT_VERSION,
        values: str | None = None,
        linears: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        content = {"quant_method": METHOD, "version": version, "values": values, "linears": linears}
        self.__dict__.update(Description.from_dict(content).to_dict())

    @property
    def description(self) -> Description:
        """The same content, checked and typed."""
        return Description.from_dict(self.__dict__)


class PrunusQuantizer(HfQuantizer):
    """Replaces dense linears by packed ones before weights are loaded, and checks them after."""

    #: Path of a packed linear in the model -> its name in a checkpoint of this model.
    _saved_names: dict[str, str]
    #: Whether the model's experts were taken apart.
    _apart = False

    # transformers must not quantize on the fly: only `prunus pack` makes packed checkpoints.
    requires_calibration = True

    def update_attn_implementation(self, config: Any) -> Any:
        """Remove `description.REFUSAL` from the configuration; few hooks see it in time."""
        if getattr(config, "transformers_weights", None) is not None:
            del config.transformers_weights
        return config

    # The hook of earlier versions of transformers.
    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Put packed linears on the meta device in place of dense ones, and rename them for saving.

        Raises:
            ValueError: Configuration and shards do not belong together.
        """
        from prunus.model.checkpoint.reader import Checkpoint
        from prunus.model.skeleton import naming_rules

        described = self.quantization_config.description
        if checkpoint_files:
            files = [Path(file) for file in checkpoint_files]
            checkpoint = Checkpoint(files[0].parent, only=[file.name for file in files])
            described.check_tensors(checkpoint.tensors)
        renamings = naming_rules(model)[0]
        paths = {name: _paths(model, renamings, name) for name in described.linears}
        self._take_experts_apart(model, list(itertools.chain(*paths.values())))
        names = {}
        self._saved_names = {}
        for name, shape in described.linears.items():
            path = _find_linear(model, name, paths[name])
            linear = model.get_submodule(path)
            if tuple(linear.weight.shape) != shape[:2]:
                raise ValueError(
                    f"{name} is {shape.out_features} x {shape.in_features} in the packed "
                    "checkpoint, but the model that config.json describes has "
                    f"{' x '.join(map(str, linear.weight.shape))}"
                )
            on_meta = {
                part: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                for part, tensor in described.tensors(name).items()
            }
            pack_module(model, path, described.weight(name, on_meta), shape.stored)
            self._saved_names[path] = paths[name][path]
            names[paths[name][path]] = shape
        # Names that the linears have when this model is saved again.
        renamed = Description(described.values, names)
        self.quantization_config.linears = renamed.to_dict()["linears"]
        use_dense_kernel(model)

    def _take_experts_apart(self, model: Any, paths: Sequence[str]) -> None:
        """Give packed experts modules of their own, which transformers would fuse otherwise."""
        from prunus.model.experts import find_fused_experts, fusing_rules, unfuse_experts

        fused = tuple(f"{path}." for path in find_fused_experts(model))
        if not any(path.startswith(fused) for path in paths):
            return
        if not hasattr(HfQuantizer, "update_weight_conversions"):
            raise ValueError(
                "packed experts need a newer transformers: pip install --upgrade transformers"
            )
        unfuse_experts(fusing_rules(model), model, "")
        self._apart = True

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Return the rules for a checkpoint's tensors, without those that fuse experts left apart.

        Versions of transformers before 5.24 do not pass the model.
        """
        from prunus.model.experts import is_fusing_rule

        rules: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        return [rule for rule in rules if not (self._apart and is_fusing_rule(rule))]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Check the loaded weights, and let the model use the kernels.

        Raises:
            ValueError: A weight is damaged or was not loaded; the message names it.
        """
        packed = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, PackedLinear)
        }
        # The kernels work without the lock of the interpreter.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(_prepare, packed, packed.values()))
        for path in expand_read_linears(model, model.dtype):
            del self.quantization_config.linears[self._saved_names[path]]
        use_fast_decoding(model)
        # A partial function, because it is copied and pickled with the model.
        model.num_parameters = functools.partial(_num_parameters, model)
        _keep_records(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Expand all packed weights; `dtype` is as for `unpack_module`, or its name."""
        # A model that was saved once has the dtype as a name in its configuration.
        stored: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model.__dict__.pop("num_parameters", None)
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                unpack_module(model, name, stored)
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` can write the model: it writes the packed form again."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile can take the model."""
        return True  # torch.compile sees each product as one operator

    @property
    def is_trainable(self) -> bool:
        """Whether the trainer of transformers may train the model."""
        return False  # packed weights never change; `prunus recover` trains their scales


def register_with_transformers() -> None:
    """Enter the quantizer in transformers' tables, once."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(PrunusConfig)
        register_quantizer(METHOD)(PrunusQuantizer)


def _prepare(name: str, module: PackedLinear) -> None:
    """Check a packed linear whose weight was loaded, and make what its products read."""
    if module.weight.device.type == "meta":
        raise ValueError(f"{name} was not loaded: packed checkpoints cannot be offloaded to disk")
    with naming(f"{name} is damaged"):
        module.prepare()


def _num_parameters(
    model: Any, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """As transformers' `num_parameters`, with packed weights: other sizes, never trainable."""
    count: int = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    for module in model.modules():
        is_excluded = exclude_embeddings and isinstance(module, PackedEmbedding)
        if isinstance(module, PackedLinear) and not only_trainable and not is_excluded:
            count += module.in_features * module.out_features
    return count


def _keep_records(model: Any) -> None:
    """Let a model that was loaded from a folder keep its card and its record when it is saved."""
    from prunus.model.loading import keep_records, records_of

    folder = Path(str(getattr(model.config, "name_or_path", "") or ""))
    if (folder / "config.json").is_file():
        keep_records(model, records_of(folder))


def _paths(model: Any, rules: Sequence[Any], name: str) -> dict[str, str]:
    """Map the paths that a checkpoint's linear may have in this model to its name when saved again.

    The model may be the one that was saved, its body alone, or a body with a head added. `rules`
    are those of transformers that rename the tensors of a checkpoint.
    """
    renamed = f"{name}.weight"
    for rule in rules:
        renamed, _ = rule.rename_source_key(renamed)
    prefix = f"{model.base_model_prefix}."
    paths: dict[str, str] = {}
    for path in (name, renamed.removesuffix(".weight")):
        paths.setdefault(path, name)
        paths.setdefault(path.removeprefix(prefix), name.removeprefix(prefix))
        paths.setdefault(prefix + path, prefix + name)
    return paths


def _find_linear(model: Any, name: str, paths: Iterable[str]) -> str:
    """Return the one of `paths` at which the packed linear `name` is in this model.

    Raises:
        ValueError: It is at none of them, or is not a linear there.
    """
    for candidate in paths:
        try:
            module = model.get_submodule(candidate)
        except AttributeError:
            continue
        if is_plain(module):
            return candidate
        raise ValueError(f"the packed linear {name!r} is a {type(module).__name__} in this model")
    raise ValueError(
        f"the model that config.json describes has no linear {name!r}; config and weights do not "
        "belong together"
    )


def expand_read_linears(model: Any, dtype: torch.dtype) -> list[str]:
    """Replace packed linears whose weight the model's code reads by dense ones; return their paths.

    Mamba multiplies with `self.dt_proj.weight`, and Mamba 2 asks for `self.lm_head.weight.dtype`.
    In a packed linear `weight` is storage, which such code would read as numbers. So these linears
    are dense in memory, although the checkpoint stores them packed.

    Args:
        model: A loaded transformers model, which is changed.
        dtype: The dtype of the dense weights.
    """
    replaced = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, PackedLinear | TiedHead):
            continue
        above, _, child = name.rpartition(".")
        kind: Any = type(model.get_submodule(above))
        if (kind.__name__, child) in _NEVER_IN_PRACTICE or not _reads_weight(kind, child):
            continue
        if isinstance(module, TiedHead):
            owner = module.embedding
            name = next(path for path, child in model.named_modules() if child is owner)
        unpack_module(model, name, dtype)
        replaced.append(name)
    return replaced


def _reads_weight(kind: Any, child: str) -> bool:
    """Whether a method of `kind`, a module's class, reads the weight of its child."""
    methods = inspect.getmembers(kind, inspect.isfunction)
    return any(
        child in _weights_read(method)
        for name, method in methods
        if not _PREPARING.match(name) and not method.__module__.startswith("torch.")
    )


@functools.cache
def _weights_read(method: Any) -> frozenset[str]:
    """Names of the children whose weight a method reads.

    Most methods of a model are those of its base class, and reading code takes a while. So it is
    read once, however many families a process loads.
    """
    try:
        return frozenset(_READ.findall(inspect.getsource(method)))
    except (OSError, TypeError):  # code without a file
        return frozenset()
