"""The quantization_config of a checkpoint in few bits: what its fields say of each weight.

Fields that are read, and those that are known to leave the weights as they are, are in lists. Any
other one is refused, since it may change what the weights mean.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prunus.model.checkpoint.tensor_files import Checkpoint

#: The packings of AutoRound that are GPTQ with zero points as they are, which is version 2.
GPTQ_V2_PACKINGS = ("auto_round", "auto_round:gptqmodel")

# Every field of a quantization_config that is read here, or known to leave the weights as they are.
# Any other one may change what they mean.
#: Fields that say what the tensors mean.
_READ = """
actorder bits block_structure checkpoint_format config_groups data_type desc_act dynamic
extra_config fmt format group_size num_bits packing_format quant_method sparsity_config strategy sym
symmetric targets type version weight_block_size weights zero_point
"""
#: Fields that say how a checkpoint was made, what is dense in it, which dtypes its tensors have,
#: how programs run it, and how they quantise activations.
_HARMLESS = """
act_bits act_data_type act_dynamic act_group_aware act_group_size act_sym activation_scale_ub
activation_scheme amp attention_input_activations autoround_version backend batch_size
block_name_to_quantize cache_block_outputs compressed-tensors_version damp_auto_increment
damp_percent dataset dequantize disable_exllama do_fuse enable_minmax_tuning enable_quanted_input
exllama_config expert_dtype foem fuse_max_seq_len global_compression_ratio gptaq
gradient_accumulate_steps ignore ignored_layers input_activations iters kv_cache_scheme lm_head
low_gpu_mem_usage lr max_input_length meta method minmax_lr model_file_base_name model_free
model_name_or_path model_seqlen module_name_preceding_first_block modules_in_block_to_quantize
modules_to_convert modules_to_fuse modules_to_not_convert mse nsamples observer observer_kwargs
output_activations pack_dtype pad_token_id provider quant_block_list quantization_status
run_compressed scale_dtype scale_fmt seqlen static_attention_dtype static_attention_granularity
static_groups static_kv_dtype static_kv_granularity supported_types to_quant_block_names tokenizer
true_sequential use_cuda_fp16 use_exllama zp_dtype
"""
_FIELDS = {*_READ.split(), *_HARMLESS.split()}
#: Fields that say that the weights are those of other inputs, or are stored with gaps.
_TRANSFORMS = {
    "rotation", "rotation_config", "sparsity_config", "spinquant_config", "transform_config",
}  # fmt: skip
#: Fields that say which weights share a scale.
OF_BLOCKS = ("strategy", "group_size", "block_structure", "weight_block_size")
#: The program that turns a checkpoint of a method into a dense one.
_TOOLS = {
    "compressed-tensors": "the package compressed-tensors",
    "bitsandbytes": "transformers (`model.dequantize()`, then `save_pretrained`)",
    "higgs": "transformers (`model.dequantize()`, then `save_pretrained`)",
    "modelopt": "NVIDIA's Model Optimizer",
    "quark": "AMD's Quark",
    "torchao": "torchao (`dequantize()` of its tensors)",
    "quanto": "optimum-quanto (`dequantize()` of its tensors)",
    "hqq": "the package hqq (`dequantize()` of its layers)",
}

#: From the name of a module to what a quantization_config says of it alone.
Rules = Callable[[str], list[dict[str, Any]]]


def method_of(described: Mapping[str, Any]) -> str:
    """The method of a quantization_config, by the layout that it has on disk.

    >>> method_of({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"})
    'gptq'
    """
    method, packing = str(described.get("quant_method")), str(described.get("packing_format"))
    of_packing = next((x for x in ("gptq", "awq") if packing.endswith(x)), method)
    of_packing = "gptq" if packing in GPTQ_V2_PACKINGS else of_packing
    return of_packing if method == "auto-round" else method


def unpack(method: str) -> str:
    """How to get the dense weights of a method."""
    tool = _TOOLS.get(method, "the program that made it")
    return f"unpack it to bfloat16 with {tool}, and give the result"


def check_fields(folder: Path, described: Mapping[str, Any]) -> None:
    """Refuse fields that change what weights mean in a way that prunus does not know.

    Raises:
        ValueError: Names the fields, and the program that unpacks the weights.
    """
    method = method_of(described)
    entries = [described]
    for field in ("config_groups", "dynamic", "extra_config"):
        entries += [rule for _, rule in _inside(described, field)]
    entries += [x["weights"] for x in entries if isinstance(x.get("weights"), dict)]
    # A field that is null, false, 0 or empty changes nothing.
    unknown = {x for entry in entries for x in entry if entry[x] and x not in _FIELDS}
    sparse = described.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
        unknown.add("sparsity_config")
    if named := ", ".join(sorted(unknown & _TRANSFORMS)):
        raise ValueError(
            f"{folder} is quantised by {method} with transforms or sparse storage, which prunus "
            f"does not read ({named}): {unpack(method)}"
        )
    if unknown:
        raise ValueError(
            f"{folder}: prunus does not know whether {', '.join(sorted(unknown))} in its "
            f"quantization_config changes what the weights mean: {unpack(method)}. If it does "
            "not, remove it from config.json"
        )


def rules_of(checkpoint: Checkpoint, described: Mapping[str, Any]) -> Rules:
    """What a quantization_config says of some modules alone, the first rule first.

    GPTQ has them in `dynamic`, for patterns, and AutoRound in `extra_config`, for names and
    patterns. compressed-tensors has only rules, for names, patterns and classes. Those for classes
    hold for all modules that no other rule names. Without a class all rules do: a module may have
    had another name when it was quantised.
    """
    groups = [
        (x["weights"], x["targets"])
        for _, x in _inside(described, "config_groups")
        if isinstance(x.get("weights"), dict) and isinstance(x.get("targets"), list)
    ]
    targets = [(str(name), weights) for weights, names in groups for name in names]
    extra = _inside(described, "extra_config")
    by_name, patterns = defaultdict[str, list[Any]](list), list[tuple[Callable[[str], Any], Any]]()
    for name, rule in (*targets, *extra):
        by_name[name].append(rule)
    modules = {name.rpartition(".")[0] for name in checkpoint.tensors}
    try:
        for name, rule in _inside(described, "dynamic"):
            patterns.append((re.compile(name.removeprefix("+:")).match, rule))
        patterns += [(re.compile(x[3:]).match, y) for x, y in targets if x.startswith("re:")]
        patterns += [(re.compile(x).search, y) for x, y in extra if x not in modules]
    except re.error as fault:
        raise ValueError(
            f"{checkpoint.folder}: {fault.pattern!r} in the quantization_config of config.json is "
            f"no pattern for names: {fault}"
        ) from fault
    of_class = [rule for target, rule in targets if target[:1].isupper()]
    others = of_class or [weights for weights, _ in groups]
    return lambda module: (
        by_name.get(module, []) + [rule for find, rule in patterns if find(module)] or others
    )


def _inside(described: Mapping[str, Any], field: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects in an object of a quantization_config, which may lack it."""
    content = described.get(field)
    items = content.items() if isinstance(content, dict) else ()
    return [(name, rule) for name, rule in items if isinstance(rule, dict)]


def block_of(kind: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[str, Any]:
    """The strategy of a description, and the block that shares a scale in a weight."""
    size = kind.get("group_size")
    block = kind.get("block_structure") or kind.get("weight_block_size")
    strategy = "block" if block else "tensor" if size is None else "channel" if size == -1 else ""
    strategy = str(kind.get("strategy") or strategy or "group")
    blocks = {"tensor": shape[-2:], "channel": (1, shape[-1]), "block": block}
    found = blocks.get(strategy, (1, size))
    return strategy, found if isinstance(found, list | tuple) else (found,)
