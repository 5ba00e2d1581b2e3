"""A tiny Llama as a GGUF file, written as llama.cpp does. Needs the package gguf."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_tokenizer import BOS, EOS, VOCABULARY, byte_tokenizer

HEADS, KEY_VALUE_HEADS = 4, 2
TOKENS = VOCABULARY + 1  # every byte, and one merge: "ab"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

# transformers' name -> llama.cpp's name: of the tensors in a block, and outside the blocks.
IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=128,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # norms are all ones by default, and a mix-up would not show
            parameter.data.normal_()
    return model


def write_gguf(
    model: LlamaForCausalLM,
    path: Path,
    quantize: str = "F32",
    pre: str = "smollm",
    facts: Mapping[str, str | int | list[str]] | None = None,
) -> dict[str, torch.Tensor]:
    """Write `model` as llama.cpp does, with `facts` as its fields `general.…`.

    Returns:
        Every weight as it reads after quantisation, by transformers' name.
    """
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    for field, value in {"name": "tiny", **(facts or {})}.items():
        kinds = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32}
        kind = kinds.get(type(value), gguf.GGUFValueType.ARRAY)
        writer.add_key_value(f"general.{field}", value, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(TOKENS)
    tokens = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*(token for token, _ in tokens), "ab"])
    writer.add_token_types([3, 3] + [1] * (TOKENS - 2))  # control, then ordinary
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_chat_template(TEMPLATE)
    kept = {}
    for name, parameter in model.state_dict().items():
        bare = name.removesuffix(".weight")
        if bare in OUTSIDE:
            target = OUTSIDE[bare]
        else:
            _, _, block, inner = bare.split(".", 3)
            target = f"blk.{block}.{IN_BLOCK[inner]}"
        array = parameter.numpy()
        heads = {"attn_q": HEADS, "attn_k": KEY_VALUE_HEADS}.get(target.split(".")[-1])
        kind = gguf.GGMLQuantizationType[quantize if array.ndim == 2 else "F32"]
        stored = gguf.quants.quantize(interleaved(array, heads), kind)
        values = gguf.quants.dequantize(stored, kind)
        kept[name] = torch.from_numpy(interleaved(values, heads, back=True).copy())
        writer.add_tensor(f"{target}.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def interleaved(array: np.ndarray, heads: int | None, back: bool = False) -> np.ndarray:
    """Reorder the rows of a query or key weight between the two conventions for rotary embeddings.

    llama.cpp rotates neighbouring features of a head; transformers rotates its two halves
    against each other. `back` goes from llama.cpp's order to that of transformers. Without
    `heads` the array stays as it is.
    """
    if heads is None:
        return array
    half = array.shape[0] // heads // 2
    shape = (heads, half, 2, -1) if back else (heads, 2, half, -1)
    return np.ascontiguousarray(array.reshape(shape).swapaxes(1, 2).reshape(array.shape))
