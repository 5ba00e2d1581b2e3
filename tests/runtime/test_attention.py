"""The attention of one token that packed models have, against transformers' own."""

import pytest
import torch

from prunus.runtime import reference_path
from prunus.runtime.fast_decoding import use_decode_attention
from tiny import tiny_model, token_ids


def _decode(model, ids, mask=None):
    """Logits (windows, steps, vocabulary) of eight fixed tokens, one at a time, after a prompt."""
    with torch.no_grad():
        mask = torch.ones_like(ids) if mask is None else mask
        out = model(ids, attention_mask=mask, use_cache=True)
        found = []
        for token in range(8):
            mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=mask.dtype)], dim=1)
            next_ids = torch.full((len(ids), 1), 3 + token)
            out = model(
                next_ids, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True
            )
            found.append(out.logits[:, -1])
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "mistral"])
@pytest.mark.parametrize("padded", [False, True])
def test_same_logits_as_sdpa(family, padded):
    """Sliding windows, scalings and padding included."""
    model = tiny_model(family, num_attention_heads=4, num_key_value_heads=2)
    ids = token_ids(3, 24)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7] = 0
        mask[2, :1] = 0
    expected = _decode(model, ids, mask)
    assert use_decode_attention(model)
    torch.testing.assert_close(_decode(model, ids, mask), expected, rtol=1e-4, atol=1e-5)
    with reference_path():
        assert torch.equal(_decode(model, ids, mask), expected)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "eager"])
def test_heads_with_keys_of_their_own_and_other_attentions_are_left_alone(kind):
    shared = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("llama", **shared) if kind == "eager" else tiny_model(kind)
    before = "eager" if kind == "eager" else "sdpa"
    model.set_attn_implementation(before)
    assert not use_decode_attention(model)
    assert model.config._attn_implementation == before
