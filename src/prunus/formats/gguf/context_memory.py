"""The memory of a model in llama.cpp: weights, KV cache and compute buffers.

    cache     2 · 2 bytes · KV heads · width of a head, for each token of the context and each block
    buffers   of 512 tokens, in float32: their logits and two hidden states, or in a block the
              products of the MLP and four hidden states, with a mask in float16 over the context

The cache is llama.cpp's default, in float16, for one conversation. It has a multiple of 256 tokens.
A block with a sliding window keeps the window and the 512 tokens that are computed together. The
buffers are those of flash attention, the default where a device has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# llama.cpp's `n_ubatch`, and what the number of tokens in a cache is a multiple of.
_TOKENS, _MULTIPLE = 512, 256


def cache_bytes(options: Mapping[str, Any], context: int) -> int:
    """Bytes of the KV cache.

    Args:
        options: The configuration of the model.
        context: Tokens of the context.

    >>> shape = {"num_hidden_layers": 30, "num_key_value_heads": 3, "head_dim": 64}
    >>> cache_bytes(shape, 8192) / 2**20  # SmolLM2-135M
    180.0
    """
    heads = options.get("num_key_value_heads") or options["num_attention_heads"]
    width = options.get("head_dim") or options["hidden_size"] // options["num_attention_heads"]
    tokens = [_rounded(context)] * options["num_hidden_layers"]
    # llama.cpp 2026 ignores the windows of Mistral and Phi 3, whose files do not use them.
    if options.get("model_type") == "gemma3_text":
        window = min(tokens[0], _rounded(options["sliding_window"] + _TOKENS))
        kinds = options["layer_types"]
        tokens = [window if kind == "sliding_attention" else tokens[0] for kind in kinds]
    return 2 * 2 * heads * width * sum(tokens)


def buffer_bytes(options: Mapping[str, Any], context: int) -> int:
    """Bytes of the compute buffers; arguments as for `cache_bytes`."""
    hidden, chosen = options["hidden_size"], options.get("num_experts_per_tok") or 1
    inner = (options.get("moe_intermediate_size") or options["intermediate_size"]) * chosen
    logits = options["vocab_size"] + 2 * hidden
    block = 3 * inner + 4 * hidden + _rounded(context) // 2
    return 4 * min(_TOKENS, _rounded(context)) * max(logits, block)


def _rounded(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE
