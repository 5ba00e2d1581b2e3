"""The norms and the rotary embedding of one token that packed models have, against transformers'
own.
"""

import copy
import importlib
import io

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from packed_reference import pruned_checkpoint
from prunus import pack
from prunus.packed import reference_path
from prunus.packed.fast_decoding import use_decode_norms, use_decode_rotary
from prunus.packed.kernels import library as kernels
from tiny import tiny_model, token_ids

if kernels.load() is None:
    pytest.skip(f"no kernels: {kernels.why_not()}", allow_module_level=True)
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
NORMS = {
    "llama": "LlamaRMSNorm",
    "gemma3_text": "Gemma3RMSNorm",  # the weight counts from one
    "olmo2": "Olmo2RMSNorm",  # rounds after the weight
    "gpt_oss": "GptOssRMSNorm",
}


def _modeling(family):
    folder = family.removesuffix("_text")
    return importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")


def _norm(family, width, dtype, seed=0):
    """A norm of the family with a random weight, and the same one on the kernel."""
    plain = getattr(_modeling(family), NORMS[family])(width)
    plain.weight.data = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    plain.to(dtype)
    fast = copy.deepcopy(plain)
    assert use_decode_norms(fast) == 1
    return plain, fast


def _counted(monkeypatch, name):
    """How often a kernel is called from here on."""
    calls, original = [], getattr(kernels.Kernels, name)
    monkeypatch.setattr(
        kernels.Kernels, name, lambda *inputs: (calls.append(1), original(*inputs))[1]
    )
    return calls


def _logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", NORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 7, 64, 577])
def test_norms_equal_the_modules_own(family, dtype, width, monkeypatch):
    plain, fast = _norm(family, width, dtype)
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    calls = _counted(monkeypatch, "rms_norm")
    with torch.no_grad():
        expected, found = plain(x), fast(x)
        assert len(calls) == 1
        if dtype == torch.float32:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        else:  # sums differ in their last digits: a number in thousands is rounded the other way
            assert (found != expected).sum() <= 1 + found.numel() // 500
            torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        with reference_path():
            assert torch.equal(fast(x), expected)
        assert len(calls) == 1


def test_what_a_norm_hands_to_its_class(monkeypatch):
    plain, fast = _norm("llama", 32, torch.bfloat16)
    calls = _counted(monkeypatch, "rms_norm")
    x = torch.randn(1, 4, 32).bfloat16()
    for each in (plain, fast):
        each.zero_grad()
        each(x).float().sum().backward()
    assert torch.equal(plain.weight.grad, fast.weight.grad)
    with torch.no_grad():
        for given in (
            x.repeat(1, 1000, 1),
            x[..., ::1].transpose(0, 1).expand(4, 2, 32),
            x.float(),
            x[:, :0],
        ):
            assert torch.equal(fast(given), plain(given))
        assert torch.equal(fast(hidden_states=x), plain(x))
        assert fast.to("meta")(x.to("meta")).is_meta
    assert not calls


def test_modules_that_are_no_such_norms_are_left_alone():
    class Centred(nn.Module):
        """Looks like one, and subtracts the mean."""

        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            x = x - x.mean(-1, keepdim=True)
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    class Picky(Centred):
        def forward(self, x):
            raise KeyError(x.dim())

    class RMSNormGated(Centred):
        def forward(self, x, gate=None):
            return x

    model = nn.Sequential(Centred(), Picky(), RMSNormGated(), nn.LayerNorm(8), nn.RMSNorm(8))
    assert use_decode_norms(model) == 0
    assert all("forward" not in vars(module) for module in model)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_rotation_is_bitwise_the_familys_own(family, dtype, monkeypatch):
    home = _modeling(family)
    use_decode_rotary(tiny_model(family))
    fast = home.apply_rotary_pos_emb
    original = fast.__wrapped__
    calls = _counted(monkeypatch, "rotate")
    generator = torch.Generator().manual_seed(0)

    def drawn(tokens, batch=1, heads=3, dim=10):
        return torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2)

    cos, sin = drawn(1)[:, 0], drawn(1)[:, 0]
    query, key = drawn(1, heads=5), drawn(1, heads=2)
    for found, expected in zip(
        fast(query, key, cos, sin), original(query, key, cos, sin), strict=True
    ):
        assert torch.equal(found, expected)
    assert len(calls) == 1
    others = {
        "several tokens": (drawn(2), drawn(2), drawn(2)[:, 0], drawn(2)[:, 0]),
        "several windows": (drawn(1, 2), drawn(1, 2), drawn(1, 2)[:, 0], drawn(1, 2)[:, 0]),
        "part of the head": (drawn(1, dim=20)[..., :10], key, cos, sin),
        "another dtype": (query, key, cos.double(), sin.double()),
        "a gradient": (query.clone().requires_grad_(), key, cos, sin),
        "by head": (query[:, :2], key, cos[None], sin[None], 0),
    }
    for name, inputs in others.items():
        for found, expected in zip(fast(*inputs), original(*inputs), strict=True):
            assert torch.equal(found, expected), name
    with reference_path():
        fast(query, key, cos, sin)
    assert len(calls) == 1


@pytest.mark.parametrize("family", ["cohere", "glm", "gpt_oss", "gpt2", "gptj"])
def test_other_rotations_are_left_alone(family):
    home = _modeling(family)
    before = getattr(home, "apply_rotary_pos_emb", None)
    assert use_decode_rotary(tiny_model(family)) == 0
    assert getattr(home, "apply_rotary_pos_emb", None) is before


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "olmo2", "mistral"])
def test_models_decode_as_before(family, monkeypatch):
    model = tiny_model(family)
    names, ids = set(model.state_dict()), token_ids(1, 12)
    with torch.no_grad():
        before = model(ids)
        step = {"past_key_values": copy.deepcopy(before.past_key_values), "use_cache": True}
        expected = model(ids[:, :1], **step).logits
        norms = use_decode_norms(model)
        use_decode_rotary(model)
        assert norms >= 5
        assert use_decode_norms(model) == use_decode_rotary(model) == 0
        assert set(model.state_dict()) == names
        calls = _counted(monkeypatch, "rms_norm"), _counted(monkeypatch, "rotate")
        again = {"past_key_values": copy.deepcopy(before.past_key_values), "use_cache": True}
        torch.testing.assert_close(
            model(ids[:, :1], **again).logits, expected, rtol=1e-5, atol=1e-5
        )
        assert [len(each) for each in calls] == [norms, 2]
        with reference_path():
            assert torch.equal(_logits(model, ids), before.logits)
    # Copies and pickles use their own weights.
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    one = ids[:, :1]
    before = _logits(model, one)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(_logits(other, one), before)
        other.model.norm.weight.data.fill_(3)
        assert not torch.equal(_logits(other, one), before)
        assert torch.equal(_logits(model, one), before)


def test_packed_models_have_all_of_it_and_save_nothing_of_it(tmp_path, monkeypatch):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    source = pruned_checkpoint(tmp_path / "pruned", "llama", **heads)
    pack(source, tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert model.config._attn_implementation == "prunus_sdpa"
    ids = token_ids(1, 1)
    calls = _counted(monkeypatch, "rms_norm"), _counted(monkeypatch, "rotate")
    before = _logits(model, ids)
    assert [len(each) for each in calls] == [5, 2]
    model.save_pretrained(tmp_path / "again")
    assert "prunus_sdpa" not in (tmp_path / "again" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(_logits(again, ids), before)
    dense = again.dequantize()
    torch.testing.assert_close(_logits(dense, ids), before, rtol=0.05, atol=0.05)
