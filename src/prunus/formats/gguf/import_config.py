"""What transformers does not read of a GGUF file: constants, biases, windows, rotary embeddings.

transformers knows some fields of each family, and its configuration has the values of one known
model for all others. Without what is here a Llama 3.1 loses the scaling of its frequencies, Gemma 3
its windows, and Phi-4-mini the share of a head that is rotated: the import would compute something
else than llama.cpp, in silence.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from prunus.formats.fixed import LLAMA_CPP
from prunus.formats.gguf.file import GgufFile
from prunus.formats.gguf.layout import llama3_factors

# Kinds of which transformers reads no file -> their names in transformers ...
UNREAD = {"olmoe": "olmoe", "phi2": "phi"}
# ... and their fields -> options.
_OPTIONS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
}
# Tensors by which frequencies are divided: of Llama 3, and of long and short texts.
_LLAMA_3, _LONG, _SHORT = (
    f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short")
)
# Positions of the first training that are tried for Llama 3; published models have the first.
_POSITIONS = [8192, *(2**power for power in range(4, 21))]


def config_of_unread(file: GgufFile) -> Any:
    """The configuration of a file of a kind in `UNREAD`."""
    prefix = file.architecture
    found = {option: file.get(f"{prefix}.{field}") for field, option in _OPTIONS.items()}
    options = {option: value for option, value in found.items() if value is not None}
    width = options["hidden_size"] // options["num_attention_heads"]
    share = file.get(f"{prefix}.rope.dimension_count", width) / width
    base = file.get(f"{prefix}.rope.freq_base", 10000.0)
    rope = {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": share}
    ids = {f"{x}_token_id": file.get(f"tokenizer.ggml.{x}_token_id") for x in ("bos", "eos")}
    size = {"vocab_size": file.shape("token_embd.weight")[0]}
    return AutoConfig.for_model(UNREAD[prefix], **options, **size, **ids, rope_parameters=rope)


def restore_constants(config: Any, file: GgufFile) -> None:
    """Set the options of a configuration that a file of its family says otherwise.

    Args:
        config: What transformers makes of the file, with the right widths; it is changed.
        file: The file.

    Raises:
        ValueError: Frequencies are scaled in a way that transformers does not know.
    """
    for option, tensor in {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}.items():
        if hasattr(config, option):
            setattr(config, option, f"blk.0.{tensor}.bias" in file.tensors)
    if file.architecture == "gemma3":
        _restore_gemma3(config, file)
    by_layer = getattr(config, "rope_parameters", None) or {}
    rope = by_layer.get("full_attention", by_layer)
    # llama.cpp takes these values where a field is missing.
    prefix, usual = f"{file.architecture}.rope", getattr(config, "max_position_embeddings", None)
    scaling = file.get(f"{prefix}.scaling.type", "linear")
    factor = file.get(f"{prefix}.scaling.factor", file.get(f"{prefix}.scale_linear", 1.0))
    original = file.get(f"{prefix}.scaling.original_context_length", usual)
    if scaling in ("linear", "yarn") and factor not in (0.0, 1.0):
        rope |= {"rope_type": scaling, "factor": factor}
        rope |= {"original_max_position_embeddings": original} if scaling == "yarn" else {}
    if file.architecture == "phi3":
        width = config.hidden_size // config.num_attention_heads
        share = file.get("phi3.rope.dimension_count", width) / width
        rope["partial_rotary_factor"] = share
    if _LONG in file.tensors and file.architecture == "phi3":
        config.original_max_position_embeddings = original
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        rope |= {"long_factor": file.read(_LONG).tolist()}
        rope |= {"short_factor": file.read(_SHORT).tolist()}
        rope |= {"attention_factor": file.get("phi3.rope.scaling.attn_factor", 1.0)}
    elif _LLAMA_3 in file.tensors:
        rope |= _llama3(rope, config.to_dict(), file.read(_LLAMA_3))
    elif _LONG in file.tensors:
        raise ValueError(f"its frequencies are scaled by {_LONG}, which is known of Phi-3 alone")


def _restore_gemma3(config: Any, file: GgufFile) -> None:
    """What llama.cpp knows of Gemma 3, and what its file says."""
    scalar: Any = LLAMA_CPP["gemma3"]["query_pre_attn_scalar"]
    [config.query_pre_attn_scalar] = scalar(config.to_dict())
    config.final_logit_softcapping = file.get("gemma3.final_logit_softcapping") or None
    slides = file.get("gemma3.attention.sliding_window_pattern", 6)
    if isinstance(slides, int):
        slides = [(index + 1) % slides > 0 for index in range(config.num_hidden_layers)]
    has_window = bool(file.get("gemma3.attention.sliding_window"))
    kinds = ("full_attention", "sliding_attention")
    config.layer_types = [kinds[bool(x) and has_window] for x in slides]
    local = {"rope_type": "default", "rope_theta": file.get("gemma3.rope.freq_base_swa", 10000.0)}
    config.rope_parameters["sliding_attention"] = local


def _llama3(rope: dict[str, Any], options: dict[str, Any], factors: torch.Tensor) -> dict[str, Any]:
    """The parameters of Llama 3's scaling that give these factors; the unscaled ones for ones."""
    scaled: dict[str, Any] = {"rope_type": "llama3", "factor": float(factors.max())}
    scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for positions in _POSITIONS:
        found = scaled | {"original_max_position_embeddings": positions}
        if torch.allclose(torch.tensor(llama3_factors(rope | found, options)), factors, 1e-4):
            return found if scaled["factor"] > 1 else {}
    raise ValueError(
        f"its frequencies are divided by {_LLAMA_3} in another way than those of Llama 3, which "
        "transformers has no option for"
    )
