"""What transformers does not read of a GGUF file: widths of heads and experts, and the experts.

Its configuration has the widths of one known model, whatever the file says. It takes Mixtral for a
Llama, as llama.cpp has one name for both, and knows only one of two shapes of Qwen2-MoE's routers.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from prunus.formats.gguf.file import GgufFile, tensor_names
from prunus.model.kinds import CAUSAL
from prunus.model.meta_model import build_on_meta

# Fields of a file -> options of transformers.
_WIDTHS = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def complete_config(config: Any, file: GgufFile) -> Any:
    """The configuration that transformers makes of a file, with what it leaves out.

    The file's widths of heads and experts replace those of `config`. A file of Mixtral, which
    transformers takes for a Llama, gets a `MixtralConfig`.
    """
    for field, option in _WIDTHS.items():
        if hasattr(config, option) and (value := file.get(f"{file.architecture}.{field}")):
            setattr(config, option, value)
    if not (count := file.get("llama.expert_count")):
        return config
    option_names = vars(transformers.MixtralConfig()).keys() - {
        "architectures",
        "transformers_version",
    }
    options = {name: value for name, value in vars(config).items() if name in option_names}
    options |= {"num_local_experts": count, "architectures": ["MixtralForCausalLM"]}
    options["num_experts_per_tok"] = file.get("llama.expert_used_count")
    return transformers.MixtralConfig(**options)


def read_experts(config: Any, file: GgufFile, dtype: torch.dtype) -> Any:
    """The model of a file of Mixtral, Qwen2-MoE or Qwen3-MoE, with weights in `dtype` on the CPU.

    Llama's queries and keys get the row order of transformers back (see layout.py): llama.cpp
    rotates neighbours, transformers rotates halves.

    Args:
        config: The configuration that `complete_config` returned.
        file: The GGUF file.
        dtype: Dtype of the weights.

    Raises:
        ValueError: The file lacks a tensor of the model.
    """
    model = build_on_meta(CAUSAL, config, dtype, False)
    names = tensor_names(file.architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    weights = {}
    for name, parameter in model.named_parameters():
        whole = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        # transformers has gate and up in one tensor.
        leaves = ("gate_proj", "up_proj") if "gate_up_proj" in name else ("",)
        pieces = [whole.replace("gate_up_proj", leaf) for leaf in leaves]
        parts = [file.read(names.get_name(x, (".weight", ".bias")) or x) for x in pieces]
        value = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if file.architecture == "llama" and (count := heads.get(name.split(".")[-2])):
            value = value.unflatten(0, (count, -1, 2)).transpose(1, 2)
        weights[name] = value.reshape(parameter.shape).to(dtype)
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    return model
