"""What llama.cpp and mlx-lm compute with whatever a configuration says.

A file of theirs has fields for sizes and for some constants. All else is code: every Llama has
SiLU, and no field says so. A model that differs there would become a file that loads and computes
something else. So there is one table for each program,

    family -> option of the configuration -> the values that the program computes with

and a model with another value is refused. An option that a configuration does not have, or has as
None, is as transformers has it by default, and that is what both programs compute. The options of
the rotary embedding count by their own names, such as `rope_type`, at whatever depth they are.

Where the facts come from, which were read and not copied:

- llama.cpp: the graph of each kind of model and the tensors that it asks for
  (https://github.com/ggml-org/llama.cpp/tree/master/src/models, one file each), `create_tensor_qkv`
  and `load_swa_pattern` in src/llama-model.cpp, and conversion/*.py for which fields are written.
  They were read in the source that llama-cpp-python 0.3.36 carries.
- mlx-lm 0.32: `ModelArgs` and the classes of each family
  (https://github.com/ml-explore/mlx-lm/tree/main/mlx_lm/models), and `initialize_rope` in
  rope_utils.py there. What `ModelArgs` does not have, mlx-lm does not read.
- transformers 5: the configuration and the model of each family say what an option changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

_SLIDING = "sliding_attention"


@dataclass(frozen=True)
class AtLeast:
    """All numbers from a smallest one on."""

    least: int

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and value >= self.least

    def __str__(self) -> str:
        return f"{self.least} (max_position_embeddings) or more"


@dataclass(frozen=True)
class SomeOf:
    """All lists with at least one entry of a kind."""

    kind: str

    def __contains__(self, value: object) -> bool:
        return isinstance(value, list) and self.kind in value

    def __str__(self) -> str:
        return f"at least one {self.kind}, without which it stops"


#: The values of an option that a program computes with, or how they follow from other options.
Values = Container[Any] | Callable[[Mapping[str, Any]], Container[Any]]
#: Family -> option -> its values.
Table = Mapping[str, Mapping[str, Values]]


def _head_width(options: Mapping[str, Any]) -> Container[Any]:
    """The width of a head where queries are as wide as the model."""
    return [options["hidden_size"] // options["num_attention_heads"]]


def _key_heads(options: Mapping[str, Any]) -> Container[Any]:
    """As many keys as queries."""
    return [options["num_attention_heads"]]


def _windows(options: Mapping[str, Any], by_layer: bool = False) -> Container[Any]:
    """The windows of attention with which every token sees all before it, as it does without one.

    Args:
        options: The configuration.
        by_layer: Whether `layer_types` says which blocks have a window; else all have it.
    """
    has_none = by_layer and _SLIDING not in (options.get("layer_types") or ())
    return AtLeast(0 if has_none else options["max_position_embeddings"])


def _gemma_scalar(options: Mapping[str, Any], blocks: int) -> Container[Any]:
    """What Gemma's attention is scaled by: llama.cpp knows the model of 27B by its blocks."""
    is_27b = options["num_hidden_layers"] == blocks
    return _head_width(options) if is_27b else [options["head_dim"]]


def _layers(
    options: Mapping[str, Any], every: int, last: Any = "full_attention", other: Any = _SLIDING
) -> Container[Any]:
    """Every second block, say, is another one than the rest."""
    kinds = (other, last)
    return [[kinds[(index + 1) % every == 0] for index in range(options["num_hidden_layers"])]]


def _exaone4_window(options: Mapping[str, Any]) -> Container[Any]:
    """EXAONE 4 has windows in the model of 32B, which llama.cpp knows by its blocks."""
    return AtLeast(1) if options["num_hidden_layers"] == 64 else []


def full_rope(options: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the rotary embedding; those of full attention if there are two."""
    return dict(options["rope_parameters"].get("full_attention", options["rope_parameters"]))


def _yarn_attention(options: Mapping[str, Any]) -> Container[Any]:
    """What YaRN multiplies queries and keys with where nothing else is said."""
    return [0.1 * math.log(full_rope(options).get("factor") or 1.0) + 1.0]


_SILU, _TANH_GELU = ("silu", "swish"), ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_BY_LAYER = partial(_windows, by_layer=True)
# What holds for a family of which a field says how much of a head is rotated ...
_PARTLY_ROTATED: dict[str, Values] = {
    "hidden_act": _SILU,
    "is_causal": [True],
    "use_bidirectional_attention": [False],
    "rope_type": ["default"],
}
# ... and for one that says nothing else.
_PLAIN: dict[str, Values] = _PARTLY_ROTATED | {"partial_rotary_factor": [1.0]}
# llama.cpp has fields for some numbers of YaRN, and reads them for none of these families.
_LINEAR_OR_YARN: dict[str, Values] = _PLAIN | {
    "rope_type": ["default", "linear", "yarn"],
    "attention_factor": _yarn_attention,
    "beta_fast": [32],
    "beta_slow": [1],
    "extrapolation_factor": [1],
    "mscale_all_dim": [0],
    "truncate": [True],
}
# Few kinds divide frequencies by a tensor of Llama 3.
_ALSO_LLAMA3 = _LINEAR_OR_YARN | {"rope_type": ["default", "linear", "llama3", "yarn"]}
_BIASES: dict[str, Values] = {"attention_bias": [False], "mlp_bias": [False]}
_NO_BIAS: dict[str, Values] = _LINEAR_OR_YARN | _BIASES
_EXPERTS: dict[str, Values] = _NO_BIAS | {
    "decoder_sparse_step": [1],
    "mlp_only_layers": [[]],
}
_PHI: dict[str, Values] = _PARTLY_ROTATED | _BIASES | {"head_dim": _head_width}

#: llama.cpp's name of a kind of model -> option -> values.
LLAMA_CPP: Table = {
    # Llama, Mistral and Mixtral.
    "llama": {**_ALSO_LLAMA3, "sliding_window": _windows},
    "qwen2": {**_NO_BIAS, "head_dim": _head_width, "sliding_window": _BY_LAYER},
    "qwen3": {**_NO_BIAS, "sliding_window": _BY_LAYER},
    "qwen2moe": {
        **_EXPERTS,
        "head_dim": _head_width,
        "norm_topk_prob": [False],
        "qkv_bias": [True],
        "sliding_window": _BY_LAYER,
        "tie_word_embeddings": [False],
    },
    "qwen3moe": {**_EXPERTS, "norm_topk_prob": [True], "sliding_window": _windows},
    "olmoe": {
        **_NO_BIAS,
        "clip_qkv": [],
        "head_dim": _head_width,
        "norm_topk_prob": [False],
        "num_key_value_heads": _key_heads,
        "tie_word_embeddings": [False],
    },
    "gemma3": {
        # Before what holds for both kinds of blocks. Blocks with a window are not scaled.
        "sliding_attention.rope_type": ["default"],
        **_NO_BIAS,
        "rope_type": ["default", "linear"],
        "hidden_activation": _TANH_GELU,
        "layer_types": SomeOf(_SLIDING),  # else llama.cpp stops with an assertion
        "query_pre_attn_scalar": partial(_gemma_scalar, blocks=62),
        "attn_logit_softcapping": [],
    },
    "phi2": {
        **_PHI,
        "hidden_act": _TANH_GELU,
        "qk_layernorm": [False],
        "rope_theta": [10000.0],
        "tie_word_embeddings": [False],
    },
    "phi3": {**_PHI, "rope_type": ["default", "longrope"], "sliding_window": _windows},
    # Those of templates alone.
    "apertus": {**_ALSO_LLAMA3, "hidden_act": ["xielu"]},
    "arcee": {**_ALSO_LLAMA3, "hidden_act": ["relu2"]},
    "bloom": {"apply_residual_connection_post_layernorm": [False]},
    **dict.fromkeys(["command-r", "falcon-h1"], _PLAIN),
    "deepseek2": {**_PARTLY_ROTATED, "rope_type": ["default", "yarn"]},
    "exaone4": {**_ALSO_LLAMA3, "sliding_window": _exaone4_window},
    "gemma": {**_PLAIN, "hidden_act": ("gelu", *_TANH_GELU)},
    "gemma2": {
        **_PLAIN,
        "hidden_activation": _TANH_GELU,
        "layer_types": partial(_layers, every=2),
        "query_pre_attn_scalar": partial(_gemma_scalar, blocks=46),
    },
    "gpt-oss": {
        **_PLAIN,
        "layer_types": partial(_layers, every=2),
        "rope_type": ["default", "yarn"],
        "swiglu_alpha": [1.702],
        "swiglu_limit": [7.0],
    },
    "hunyuan-dense": {**_PLAIN, "rope_type": ["default", "dynamic"]},
    **dict.fromkeys(["granite", "granitemoe"], _ALSO_LLAMA3),
    **dict.fromkeys(["lfm2", "olmo", "seed_oss"], _LINEAR_OR_YARN),
    "mamba": {"hidden_act": _SILU},
    "mamba2": {"hidden_act": _SILU},
    "olmo2": {"sliding_attention.rope_type": ["default"], **_LINEAR_OR_YARN},
    "smollm3": {
        **_LINEAR_OR_YARN,
        "no_rope_layers": partial(_layers, every=4, last=0, other=1),
        "sliding_window": _BY_LAYER,
    },
    **dict.fromkeys(["qwen35", "stablelm"], _PARTLY_ROTATED),
    "starcoder2": {
        **_PLAIN,
        # Its exact GELU differs from the approximation of these families by less than 0.0005.
        "hidden_act": ("gelu", *_TANH_GELU),
        "sliding_window": _windows,
    },
}

# Families of mlx-lm that read the scaling of the rotary embedding. Others read the rotated part.
_SCALED: dict[str, Values] = _PLAIN | {"rope_type": ["default", "linear", "llama3", "yarn"]}
#: Type of a model in transformers -> option -> values of mlx-lm.
MLX: Table = {
    **dict.fromkeys(["granite", "ministral3", "olmo2", "olmo3", "seed_oss", "smollm3"], _SCALED),
    "llama": {**_SCALED, "sliding_window": _BY_LAYER},
    "mistral": {**_SCALED, "sliding_window": _windows},
    "qwen2": {**_SCALED, "head_dim": _head_width, "sliding_window": _BY_LAYER},
    "qwen3": {**_SCALED, "attention_bias": [False], "sliding_window": _BY_LAYER},
    "apertus": {**_SCALED, "hidden_act": ["xielu"]},
    "gemma3_text": {
        # Before what holds for both kinds of blocks.
        "sliding_attention.rope_type": ["default"],
        **_SCALED,
        "attention_bias": [False],
        "attn_logit_softcapping": [],
        "final_logit_softcapping": [],
        "hidden_activation": _TANH_GELU,
        "layer_types": partial(_layers, every=6),
    },
    **dict.fromkeys(["cohere", "glm", "mamba2", "stablelm"], _PARTLY_ROTATED),
    # Its exact GELU differs from the approximation of these families by less than 0.0005.
    "gemma": {**_PARTLY_ROTATED, "attention_bias": [False], "hidden_act": ("gelu", *_TANH_GELU)},
    "starcoder2": {
        **_PARTLY_ROTATED,
        "hidden_act": ("gelu", *_TANH_GELU),
        "sliding_window": _windows,
        "use_bias": [True],
    },
    "gemma2": {
        **_PARTLY_ROTATED,
        "attention_bias": [False],
        "hidden_activation": _TANH_GELU,
        "sliding_window": _BY_LAYER,
    },
    "phi": {**_PARTLY_ROTATED, "hidden_act": _TANH_GELU, "qk_layernorm": [False]},
    "nemotron": {**_PARTLY_ROTATED, "hidden_act": ["relu2"], "rope_type": ["default", "linear"]},
    "phi3": {
        **_PARTLY_ROTATED,
        "head_dim": _head_width,
        "rope_type": ["default", "linear", "longrope"],
        "sliding_window": _windows,
    },
}

# Options that fields and tensors of a GGUF file hold.
_HELD = {
    "attention_bias", "final_logit_softcapping", "head_dim", "hidden_size", "intermediate_size",
    "layer_norm_eps", "layer_types", "max_position_embeddings", "mlp_bias", "moe_intermediate_size",
    "num_attention_heads", "num_experts", "num_experts_per_tok", "num_hidden_layers",
    "num_key_value_heads", "num_local_experts", "original_max_position_embeddings",
    "partial_rotary_factor", "rms_norm_eps", "rope_parameters", "shared_expert_intermediate_size",
    "sliding_window", "tie_word_embeddings", "vocab_size",
}  # fmt: skip
# Those of them of which only an entry of the table says how llama.cpp computes them.
_TABLED = {"layer_types", "rope_parameters", "sliding_window"}
# Options of training, or of what other options say as well: they change no output.
_WITHOUT_EFFECT = {
    "_sliding_window_pattern", "attention_dropout", "bos_token_id", "embd_pdrop", "eos_token_id",
    "initializer_range", "max_window_layers", "output_router_logits", "pad_token_id",
    "pretraining_tp", "resid_pdrop", "router_aux_loss_coef", "router_jitter_noise", "use_cache",
    "use_sliding_window",
}  # fmt: skip


def check_fixed(
    program: str, result: str, config: PreTrainedConfig, values: Mapping[str, Values]
) -> None:
    """Check that a program computes a model as transformers does.

    Args:
        program: What messages call the program.
        result: What messages call a file for it.
        config: The configuration of the text model.
        values: The entry of its family in a table.

    Raises:
        NotImplementedError: It does not; names the option, and both values.
    """
    options = config.to_dict()
    for name, value in _named(options):
        for option, computed in values.items():
            if value is None or not f".{name}".endswith(f".{option}"):
                continue
            allowed = computed(options) if callable(computed) else computed
            if value not in allowed:
                kind = (config.architectures or [config.model_type])[0]
                raise NotImplementedError(
                    f"{program} computes every {kind} with {option} = {_words(allowed)}, and this "
                    f"model has {value}: it cannot be written as {result}{_remedy(allowed)}"
                )


def check_known(config: PreTrainedConfig, values: Mapping[str, Values]) -> None:
    """Check that no option has a value of its own that a GGUF file does not hold.

    transformers may get new options, of which prunus does not know what they change.

    Args:
        config: The configuration of the text model.
        values: As for `check_fixed`.

    Raises:
        NotImplementedError: There is one; names it and its value.
    """
    usual, options = type(config)().to_dict(), config.to_dict()
    for option in sorted(usual.keys() - _known(values)):
        if options.get(option) != usual[option]:
            raise NotImplementedError(
                f"prunus does not know whether llama.cpp computes {option} = {options[option]}, "
                f"and usual is {usual[option]}: it cannot be written as a GGUF file. A newer "
                "version of prunus may know"
            )


def _known(values: Mapping[str, Values]) -> set[str]:
    """The options of which is known how a program computes them, by its entry in a table."""
    return {*values, *_HELD, *_WITHOUT_EFFECT, *PreTrainedConfig().to_dict()}


# Field of a GGUF file, without its kind -> options that say the same.
_STATED = {
    "attention.head_count": ("num_attention_heads",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.scale": ("attention_multiplier",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "embedding_length": ("hidden_size",),
    "embedding_scale": ("embedding_multiplier",),
    "expert_used_count": ("num_experts_per_tok",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "residual_scale": ("residual_multiplier",),
    "rope.freq_base": ("rope_theta",),
}


def check_template(
    path: Path, kind: str, field: Callable[[str], Any], config: PreTrainedConfig
) -> list[str]:
    """Check that llama.cpp computes a template as transformers does the model, as far as known.

    Where llama.cpp's kind is in the table, the configuration must be one that it computes. Of any
    kind, fields and options that say the same must agree; one of several options is enough.

    Args:
        path: The template.
        kind: llama.cpp's name of its kind.
        field: Returns the value of a field by its name; None where there is none.
        config: The configuration of the text model.

    Returns:
        The options that were compared with nothing.

    Raises:
        NotImplementedError: As for `check_fixed`.
        ValueError: A field and an option differ; names both.
    """
    values = LLAMA_CPP.get(kind, {})
    check_fixed("llama.cpp", "a GGUF file", config, values)
    options = list(_named(config.to_dict()))
    compared = _known(values) - (set() if values else _TABLED)
    for name, names in _STATED.items():
        stated = field(f"{kind}.{name}")
        said = {
            option: value
            for option, value in options
            if option.rpartition(".")[2] in names and isinstance(value, int | float)
        }
        # The converter writes 0 heads for a model without attention, such as Mamba.
        if not isinstance(stated, int | float) or not stated or not said:
            continue
        if not any(math.isclose(stated, value, rel_tol=1e-5) for value in said.values()):
            first, value = next(iter(said.items()))
            raise ValueError(
                f"{path} is not a file of this model: its field {kind}.{name} is {stated:g}, and "
                f"config.json has {first} = {value}. Give what llama.cpp's converter makes of it"
            )
        compared |= said.keys()
    usual = type(config)().to_dict()
    return sorted(x for x, value in options if value and x in usual.keys() - compared)


def _named(options: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every option with its name, and those within it as `outer.inner`."""
    for name, value in options.items():
        yield f"{before}{name}", value
        if isinstance(value, dict):
            yield from _named(value, f"{before}{name}.")


def _words(allowed: Container[Any]) -> str:
    """The values that an option may have, for people."""
    values = allowed if isinstance(allowed, list | tuple) else [allowed]
    return " or ".join(map(str, values)) or "None"


def _remedy(allowed: Container[Any]) -> str:
    """What a user can do, as the end of a message; for windows alone there is something."""
    if not isinstance(allowed, AtLeast):
        return ""
    return (
        ", unless you lower max_position_embeddings in its config.json to the window: for texts up "
        "to that length both are the same"
    )
