"""The attention of one token that packed models have, against transformers' own."""

import pytest
import torch

from packed_reference import decoded
from prunus.runtime import reference_path
from prunus.runtime.fast_decoding import use_decode_attention
from tiny import tiny_model, token_ids


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
    expected = decoded(model, ids, 8, mask)
    assert use_decode_attention(model)
    torch.testing.assert_close(decoded(model, ids, 8, mask), expected, rtol=1e-4, atol=1e-5)
    with reference_path():
        assert torch.equal(decoded(model, ids, 8, mask), expected)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "eager"])
def test_heads_with_keys_of_their_own_and_other_attentions_are_left_alone(kind):
    shared = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("llama", **shared) if kind == "eager" else tiny_model(kind)
    before = "eager" if kind == "eager" else "sdpa"
    model.set_attn_implementation(before)
    assert not use_decode_attention(model)
    assert model.config._attn_implementation == before
