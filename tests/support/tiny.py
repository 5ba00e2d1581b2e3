"""Tiny random checkpoints of many families."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

#: Sizes of a transformer, and the rest that most language models need.
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
COMMON: dict[str, Any] = SIZES | {
    "vocab_size": 128,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MAMBA: dict[str, Any] = {"state_size": 4, "expand": 2, "conv_kernel": 4}
_MAMBA2: dict[str, Any] = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_n_groups": 1}
_ALTERNATING: dict[str, Any] = {
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}

#: Families that need no options but the common ones, and those that need the width of a head.
_PLAIN = [
    "llama", "qwen2", "phi", "phi3", "gpt_neox", "olmo", "olmo2", "granite", "stablelm",
    "starcoder2", "cohere", "nemotron", "smollm3", "apertus", "bitnet", "arcee",
]  # fmt: skip
_WITH_HEAD_DIM = ["qwen3", "gemma", "glm", "ministral3", "seed_oss"]

#: Family -> the options that it needs in addition to the common ones.
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN},
    **{name: {"head_dim": 8} for name in _WITH_HEAD_DIM},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": _ALTERNATING | {"query_pre_attn_scalar": 8},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": True},
    "gpt2": _GPT2,
    "gptj": _GPT2 | {"rotary_dim": 4},
    "codegen": _GPT2 | {"rotary_dim": 4},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"alibi": False, "new_decoder_architecture": False},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2},
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
        "attn_layer_indices": [1],
    },
    "mamba": _MAMBA | {"time_step_rank": 4},
    "mamba2": _MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "jamba": {
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "falcon_h1": _MAMBA2
    | {
        "head_dim": 8,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_chunk_size": 8,
    },
    "granitemoehybrid": _MAMBA2
    | {
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_chunk_size": 8,
        "layer_types": ["mamba", "attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "olmo3": _ALTERNATING,
    "gemma4_text": _ALTERNATING
    | {
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 128,
        "num_kv_shared_layers": 0,
    },
    "qwen3_5_text": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "exaone4": _ALTERNATING | {"sliding_window_pattern": 2},
}


_ROUTED: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT: dict[str, Any] = _ROUTED | {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_SHARED: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 32,
    "head_dim": 8,
}

#: The same for mixtures of experts.
EXPERT_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen2_moe": _SHARED,
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen3_next": _SHARED | {"layer_types": ["full_attention"] * 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe": _ROUTED | {"head_dim": 8},
    "dots1": _ROUTED,
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "lfm2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "layer_types": ["full_attention"] * 2,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "granitemoe": {"num_local_experts": 4},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 32},
    "nemotron_h": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "layers_block_type": ["attention", "moe"],
        "head_dim": 8,
        "moe_shared_expert_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
}


def seed_torch(seed: int) -> None:
    """Seed the random numbers of torch, as `torch.manual_seed` does.

    While no device is in use, that function notes the seed and its own stack for each kind of
    device, which takes longer than many tests do.
    """
    seed_all = torch.cuda.is_initialized()
    (torch.manual_seed if seed_all else torch.default_generator.manual_seed)(seed)


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A random causal LM with blocks of width 32."""
    config = AutoConfig.for_model(
        family, **{**COMMON, **FAMILIES.get(family, {}), **_of_experts(family), **options}
    )
    seed_torch(1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if family in EXPERT_FAMILIES and (
                ".experts." in name or "router" in name or ".gate." in name
            ):
                parameter.normal_(
                    0, 0.3
                )  # so that experts differ, and tokens choose different ones
            elif parameter.dim() == 1:  # norms and biases that are not all ones or zeros
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _of_experts(family: str) -> dict[str, Any]:
    if family not in EXPERT_FAMILIES:
        return {}
    return {"moe_intermediate_size": 16, **EXPERT_FAMILIES[family]}


def tiny_checkpoint(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """Save a `tiny_model`; returns the folder.

    Tests ask for the same few models again and again. From the second time on, the files and the
    state of the random numbers are copies of those of the first time.
    """
    if folder.exists() and any(folder.iterdir()):
        tiny_model(family, dtype, **options).save_pretrained(folder)
        return folder
    key = repr((family, dtype, sorted(options.items())))
    if key not in _SAVED:
        tiny_model(family, dtype, **options).save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        _SAVED[key] = files, torch.get_rng_state()
        return folder
    files, random_state = _SAVED[key]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.set_rng_state(random_state)
    return folder


#: Arguments of `tiny_checkpoint` -> the files, and the random state after making them.
_SAVED: dict[str, tuple[dict[str, bytes], torch.Tensor]] = {}


def prune_in_place(model: Any, sparsity: float = 0.5) -> Any:
    """Zero the smallest entries of every row of every matrix inside the blocks."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            inside = any(part in name for part in (".layers.", ".h.", ".blocks."))
            if inside and parameter.dim() == 2:
                count = int(parameter.shape[1] * sparsity)
                smallest = parameter.float().abs().argsort(dim=1)[:, :count]
                parameter.scatter_(1, smallest, 0)
    return model


def pruned_checkpoint(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    sparsity: float = 0.5,
    **options: Any,
) -> Path:
    prune_in_place(tiny_model(family, dtype, **options), sparsity).save_pretrained(folder)
    return folder


def token_ids(windows: int = 6, tokens: int = 16, vocabulary: int = 128) -> torch.Tensor:
    """Random calibration windows (windows, tokens), always the same."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, vocabulary, (windows, tokens), generator=generator)


def ids_file(path: Path, windows: int = 6, tokens: int = 16) -> Path:
    """Save `token_ids`; returns the path."""
    save_file({"input_ids": token_ids(windows, tokens)}, path)
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint under the names in its files."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def block_shards(folder: Path) -> list[Path]:
    """The shards of the finished blocks of a result; the last one has all else."""
    found = sorted(folder.glob("model-*-of-*.safetensors"))
    return [path for path in found if path.name[6:11] != path.name[15:20]]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Path below a folder -> the bytes of a file, or None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
