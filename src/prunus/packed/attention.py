"""Attention of one new token for models whose heads share keys and values.

transformers' `sdpa` hands such a token to torch with `enable_gqa`, and torch's CPU path copies the
keys and values for every head. Here the heads that share a key become the rows of one small product
instead. The result is the same up to rounding and takes a tenth of the time: 30 µs instead of
320 µs for 12 heads on 2 keys and 170 tokens, on one core of an AMD EPYC (Zen 4). `sdpa` still
computes all other calls, and every call on the reference path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prunus.packed.operators import on_reference_path

_NAME = "prunus_sdpa"


def use_decode_attention(model: Any) -> bool:
    """Let a transformers model that uses `sdpa` use this attention, in place.

    A model with any other attention stays as it is.

    Returns:
        True if the model uses this attention now. That needs heads that share keys and a family
        that takes its attention function from transformers' table.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    shared = any(getattr(module, "num_key_value_groups", 1) > 1 for module in model.modules())
    if not shared or any(getattr(each, "_attn_implementation", None) != "sdpa" for each in configs):
        return False
    if _NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(_NAME, _attention)
        AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(_NAME)
    return bool(model.config._attn_implementation == _NAME)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **further: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the attention of one token, in the signature that transformers expects.

    query is (batch, heads, tokens, dim), key and value are (batch, shared heads, length, dim). The
    output is (batch, tokens, heads, dim); in place of the attention weights there is None.
    """
    batch, heads, tokens, dim = query.shape
    shared = key.shape[1]
    plain = tokens == 1 and heads > shared and query.device.type == "cpu" and dropout == 0.0
    for_all_heads = attention_mask is None or attention_mask.shape[1] == 1
    unusual = further.get("softcap") or further.get("position_bias") is not None
    if not plain or not for_all_heads or unusual or on_reference_path():
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        done: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **further
        )
        return done
    # Head h uses key h // (heads / shared), so heads that share a key are neighbours.
    grouped = query.reshape(batch, shared, heads // shared, dim)
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(batch, 1, heads, value.shape[-1]), None
