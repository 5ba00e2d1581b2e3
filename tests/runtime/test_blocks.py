"""Blocks that decode a token in one call of a kernel, against the modules of transformers."""

import copy
import io

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from packed_reference import decoded, pruned_checkpoint
from prunus import pack
from prunus.runtime import reference_path, use_dense_kernel
from prunus.runtime.bitmap import pack_weight
from prunus.runtime.blocks import use_block_kernel
from prunus.runtime.kernels import library as kernels
from prunus.runtime.linear import PackedLinear, pack_module
from prunus.runtime.planes import encode
from tiny import tiny_model, token_ids
from tiny_tokenizer import byte_tokenizer

if kernels.load() is None:
    pytest.skip(f"no kernels: {kernels.why_not()}", allow_module_level=True)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]


def _quantised(family, dtype=torch.float32):
    """A model whose linears are quantised, with random norms and biases."""
    model = tiny_model(family, dtype, num_attention_heads=4, num_key_value_heads=2)
    generator = torch.Generator().manual_seed(1)
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                rows, columns = module.weight.shape
                levels = (3 * torch.randn(rows, columns, generator=generator)).round()
                weight = encode(
                    levels.clamp(-9, 9).to(torch.int8),
                    torch.full((columns,), 0.04),
                    0.5 + torch.rand(rows, generator=generator),
                )
                pack_module(block, name, weight, None)
        for parameter in block.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model.eval()


@pytest.fixture
def calls(monkeypatch):
    """One entry for each call of the kernel."""
    found, original = [], kernels.Kernels.block
    monkeypatch.setattr(
        kernels.Kernels, "block", lambda *inputs: (found.append(1), original(*inputs))[1]
    )
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("windows", ["one", "batch", "padded"])
def test_same_logits_as_the_modules(family, windows, calls):
    """In windows that slide as well, whose length is 8."""
    model = _quantised(family)
    ids = token_ids(1 if windows == "one" else 3, 6)
    mask = torch.ones_like(ids)
    if windows == "padded":
        mask[0, :4] = mask[2, :1] = 0
    expected = decoded(model, ids, mask=mask)
    use_block_kernel(model)
    found = decoded(model, ids, mask=mask)
    assert len(calls) == 2 * 12
    # The products of the modules round the same activations, which differ in their last digits.
    error = (found - expected).norm() / expected.norm()
    assert error < 2e-2
    with reference_path():
        decoded(model, ids, mask=mask)
    assert len(calls) == 2 * 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_cache(family, dtype, calls):
    """With bitmaps, whose products do not depend on the last digits of activations."""
    model = tiny_model(family, dtype, num_attention_heads=4, num_key_value_heads=2)
    stored = torch.bfloat16 if dtype == torch.float32 else dtype
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                pack_module(block, name, pack_weight(module.weight.to(stored), stored), None)
    ids = token_ids(1, 5)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        expected = model.model(ids[:, :1], past_key_values=cache).last_hidden_state
        use_block_kernel(model)
        found = model.model(ids[:, :1], past_key_values=other).last_hidden_state
    assert len(calls) == 2
    tolerance = {"rtol": 20 * torch.finfo(dtype).eps, "atol": 20 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found, expected, **tolerance)
    for layer, same in zip(other.layers, cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, same.keys, **tolerance)
        torch.testing.assert_close(layer.values, same.values, **tolerance)
        assert layer.get_seq_length() == same.get_seq_length() == 6


def test_dense_models_take_it_too(calls):
    model = tiny_model("qwen2", torch.bfloat16)
    expected = decoded(model, token_ids(1, 5))
    use_dense_kernel(model)
    use_block_kernel(model)
    found = decoded(model, token_ids(1, 5))
    assert len(calls) == (24 if kernels.load().has_bfloat16 else 0)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_caches_that_are_copied_cropped_and_continued(calls):
    """No two caches share the memory that new tokens are written to."""
    model, ids = _quantised("qwen2"), token_ids(1, 6)
    with torch.no_grad():
        prompt = model(ids, use_cache=True).past_key_values

        def after(tokens, cache):
            for token in tokens:
                out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            return out.logits

        def fresh():
            return model(ids, use_cache=True).past_key_values

        expected = after([5, 6, 7], fresh()), after([5, 8], fresh()), after([9], fresh())
        use_block_kernel(model)
        after([5], prompt)
        deep, shallow = copy.deepcopy(prompt), copy.copy(prompt)
        shallow.layers = [copy.copy(layer) for layer in prompt.layers]
        found = after([6, 7], prompt), after([8], deep)
        torch.testing.assert_close(found, expected[:2], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(after([8], shallow), expected[1], rtol=1e-2, atol=1e-2)
        prompt.crop(-3)
        torch.testing.assert_close(after([9], prompt), expected[2], rtol=1e-2, atol=1e-2)
        long = fresh()
        for token in range(300):  # more than there is room for at first
            after([token % 100], long)
        assert long.get_seq_length() == 306
    assert len(calls) == 2 * 306


@pytest.mark.parametrize("options", [{}, {"stop_strings": ["q"]}, {"num_beams": 2}])
def test_a_tokenizer_given_to_generate_leaves_the_kernel_in_use(options, calls):
    """Servers give one with every request, whether or not it has stop strings."""
    model, ids = _quantised("llama"), token_ids(1, 5)
    use_block_kernel(model)
    model.generate(ids, tokenizer=byte_tokenizer(), max_new_tokens=4, min_new_tokens=4, **options)
    assert len(calls) == 2 * 3


def test_what_a_block_leaves_to_its_modules(calls):
    model, ids = _quantised("llama"), token_ids(1, 6)
    use_block_kernel(model)
    expected = decoded(model, ids, 2)
    del calls[:]
    attention = model.model.layers[0].self_attn
    seen = []
    hook = attention.o_proj.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(decoded(model, ids, 2), expected, rtol=1e-2, atol=1e-2)
    assert len(seen) == 3  # a prompt and two tokens
    assert len(calls) == 2  # of the other block
    hook.remove()
    before, attention.v_proj = attention.v_proj, torch.nn.Linear(32, 16, bias=False)
    attention.v_proj.weight.data.zero_()
    assert not torch.allclose(decoded(model, ids, 2), expected, rtol=1e-2, atol=1e-2)
    attention.v_proj = before
    model.model.layers[0].input_layernorm.weight.data = torch.zeros(32)
    assert not torch.allclose(decoded(model, ids, 2), expected, rtol=1e-2, atol=1e-2)
    del calls[:]
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)  # gradients are recorded
    with torch.no_grad():
        model(ids[:, :1], use_cache=False)
        model(ids[:, :2], past_key_values=cache)
        model.set_attn_implementation("eager")
        model(ids[:, :1], past_key_values=cache)
    assert not calls


def test_copies_pickles_and_other_dtypes_use_their_own_weights(calls):
    model, ids = _quantised("qwen3"), token_ids(1, 4)
    use_block_kernel(model)
    expected = decoded(model, ids, 2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(decoded(other, ids, 2), expected)
        other.model.layers[1].post_attention_layernorm.weight.data.fill_(3)
        assert not torch.equal(decoded(other, ids, 2), expected)
        assert torch.equal(decoded(model, ids, 2), expected)
    half = decoded(model.bfloat16(), ids, 2)
    assert half.dtype == torch.bfloat16
    assert (half - expected).norm() < 0.1 * expected.norm()
    assert len(calls) == 4 * 8


def test_packed_models_decode_with_it_and_save_nothing_of_it(tmp_path, calls):
    source = pruned_checkpoint(tmp_path / "pruned", "llama")
    pack(source, tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert all(isinstance(each.mlp.up_proj, PackedLinear) for each in model.model.layers)
    before = decoded(model, token_ids(1, 5), 2)
    assert len(calls) == 4
    model.save_pretrained(tmp_path / "again")
    assert "prunus_sdpa" not in (tmp_path / "again" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(decoded(again, token_ids(1, 5), 2), before)
    dense = again.dequantize()
    torch.testing.assert_close(decoded(dense, token_ids(1, 5), 2), before, rtol=0.05, atol=0.05)


def test_unknown_families_keep_their_modules():
    for family in ("phi3", "gpt2"):
        model = tiny_model(family)
        use_block_kernel(model)
        assert not any("forward" in module.__dict__ for module in model.modules())
