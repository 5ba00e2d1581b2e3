"""Packed checkpoints through transformers: load, run, save, compile; and what happens without
prunus.
"""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import prunus
from packed_reference import pruned_checkpoint, random_sparse
from plane_reference import quantized_checkpoint, quantized_weight
from prunus import pack, unpack
from prunus.hardware.numerics import fast_linears
from prunus.runtime import DenseLinear, PackedLinear, operators, reference_path
from prunus.runtime.bitmap import pack_weight
from prunus.runtime.description import REFUSAL
from prunus.runtime.linear import TiedHead
from prunus.runtime.weight import named_tensors
from tiny import tiny_checkpoint, token_ids

IDS = token_ids(2, 24)
UP = "model.layers.0.mlp.up_proj"


def _load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def _bitmap(rows, columns):
    return pack_weight(random_sparse(rows, columns, 0.5, torch.bfloat16), torch.bfloat16)


def _logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pruned model, packed and unpacked, with bf16 and with int8 values, and quantised."""
    root = tmp_path_factory.mktemp("loading")
    source = pruned_checkpoint(root / "pruned", "qwen2", tie_word_embeddings=True)
    for values in ("bf16", "int8"):
        pack(source, root / f"packed-{values}", values)
        unpack(root / f"packed-{values}", root / f"plain-{values}")
    quantized_checkpoint(source, root / "packed-planes")
    unpack(root / "packed-planes", root / "plain-planes")
    return root


FORMS = ["bf16", "int8", "planes"]


@pytest.mark.parametrize("values", FORMS)
def test_logits_are_those_of_the_unpacked_model(folders, values, monkeypatch):
    monkeypatch.setattr("prunus.runtime.kernels.library.MAX_PLANE_TOKENS_WITHOUT", 256)
    packed, plain = _load(folders / f"packed-{values}"), _load(folders / f"plain-{values}")
    with reference_path():
        for tokens in (1, 5, 24):
            ids = IDS[:1, :tokens]
            assert torch.equal(_logits(packed, ids), _logits(plain, ids))
    # Beyond the kernels' tokens, the ordinary path is that one too.
    long = IDS.repeat(12 if values == "planes" else 1, 2)
    with fast_linears():
        assert torch.equal(_logits(packed, long), _logits(plain, long))
    # Kernels are as close to float32 as torch is; quantised weights take inputs of 8 bits.
    exact = _logits(_load(folders / f"plain-{values}", dtype=torch.float32), IDS[:1, :4])
    error = (_logits(packed, IDS[:1, :4]) - exact).norm()
    factor = 3 if values == "planes" else 1.5
    assert error < factor * (_logits(plain, IDS[:1, :4]) - exact).norm()


#: Other norms, activations, biases, joined linears, and heads; tied, scaled and shared embeddings.
FAMILIES = "gemma2 phi phi3 opt gptj gpt_neox bloom mpt olmo2 cohere glm"


@pytest.mark.parametrize("family", FAMILIES.split())
def test_families(tmp_path, family):
    source = pruned_checkpoint(tmp_path / "pruned", family)
    record = pack(source, tmp_path / "packed")
    packed, plain = _load(tmp_path / "packed"), _load(source)
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == len(record.linears)
    with reference_path():
        assert torch.equal(_logits(packed), _logits(plain))
    close = (_logits(packed, IDS[:1, :3]) - _logits(plain, IDS[:1, :3])).float()
    assert close.norm() < 0.05 * _logits(plain, IDS[:1, :3]).float().norm()


@pytest.mark.parametrize("values", FORMS)
def test_saving_and_loading_again(folders, tmp_path, values):
    model = _load(folders / f"packed-{values}")
    model.save_pretrained(tmp_path / "again", max_shard_size="4KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
    again = _load(tmp_path / "again")
    assert torch.equal(_logits(again), _logits(model))
    unpack(tmp_path / "again", tmp_path / "plain")
    assert torch.equal(
        _logits(_load(tmp_path / "plain")), _logits(_load(folders / f"plain-{values}"))
    )


def test_the_body_alone(folders, tmp_path):
    body = AutoModel.from_pretrained(folders / "packed-bf16")
    assert isinstance(body.layers[0].mlp.up_proj, PackedLinear)
    body.save_pretrained(tmp_path / "body")
    with_head = _load(tmp_path / "body")  # the head is tied, so nothing is missing
    assert torch.equal(_logits(with_head), _logits(_load(folders / "packed-bf16")))


@pytest.mark.parametrize("values", FORMS)
def test_a_head_and_the_embedding_tied_to_it_are_packed_once(folders, values):
    model, plain = _load(folders / f"packed-{values}"), _load(folders / f"plain-{values}")
    assert isinstance(model.lm_head, TiedHead)
    assert model.lm_head.embedding is model.model.embed_tokens
    assert torch.equal(model.model.embed_tokens(IDS), plain.model.embed_tokens(IDS))
    with pytest.raises(IndexError):
        model.model.embed_tokens(IDS + model.config.vocab_size)
    copied = copy.deepcopy(model)
    assert copied.lm_head.embedding is copied.model.embed_tokens
    model.tie_weights()  # as some of transformers' own functions do: there is nothing to tie
    assert torch.equal(_logits(model), _logits(copied))
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert stored < 0.75 * plain.get_memory_footprint()
    for without in (False, True):
        expected = plain.num_parameters(exclude_embeddings=without)
        assert model.num_parameters(exclude_embeddings=without) == expected
    assert copied.num_parameters() == plain.num_parameters()
    assert model.num_parameters(only_trainable=True) < 5_000
    dense = model.dequantize()
    assert dense.num_parameters() == plain.num_parameters()
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert torch.equal(_logits(dense), _logits(plain))


@pytest.mark.parametrize("values", FORMS)
def test_packed_checkpoint_is_inspected_and_scored_and_not_packed_again(folders, values, tmp_path):
    packed, plain = folders / f"packed-{values}", folders / f"plain-{values}"
    found, expected = prunus.inspect(packed), prunus.inspect(plain)
    assert [each.zeros for each in found.linears] == [each.zeros for each in expected.linears]
    assert found.bits is not None
    save_file({"input_ids": IDS}, tmp_path / "ids.safetensors")
    score = prunus.perplexity(packed, tmp_path / "ids.safetensors", seqlen=24, stream=False)
    assert score.protocol.endswith("bfloat16")
    with pytest.raises(ValueError, match="is packed already; give the checkpoint that it was"):
        pack(packed, tmp_path / "again")
    with pytest.raises(ValueError, match="is packed already"):
        prunus.prune(packed, tmp_path / "again", calibration=IDS)
    assert not (tmp_path / "again").exists()


def test_an_embedding_that_scales_its_rows_is_packed_with_the_head_tied_to_it(tmp_path):
    source = pruned_checkpoint(tmp_path / "pruned", "gemma3_text", tie_word_embeddings=True)
    assert "model.embed_tokens" in pack(source, tmp_path / "packed").linears
    model, plain = _load(tmp_path / "packed"), _load(source)
    assert isinstance(model.lm_head, TiedHead)
    assert torch.equal(model.model.embed_tokens(IDS), plain.model.embed_tokens(IDS))
    with reference_path():
        assert torch.equal(_logits(model), _logits(plain))
        dense = model.dequantize()
        assert torch.equal(_logits(dense), _logits(plain))
    assert type(dense.model.embed_tokens) is type(plain.model.embed_tokens)


@pytest.mark.parametrize("values", ["bf16", "planes"])
def test_generation_and_dequantization(folders, tmp_path, values):
    packed, plain = _load(folders / f"packed-{values}"), _load(folders / f"plain-{values}")
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    with reference_path():
        assert torch.equal(
            packed.generate(IDS[:1, :4], **options), plain.generate(IDS[:1, :4], **options)
        )
    assert packed.generate(IDS[:1, :4], **options).shape == (1, 10)
    packed.save_pretrained(tmp_path)  # which leaves the dtype's name in the configuration
    dense = packed.dequantize()
    assert not any(isinstance(module, PackedLinear) for module in dense.modules())
    assert torch.equal(_logits(dense), _logits(plain))


@pytest.mark.parametrize("values", FORMS)
def test_a_model_of_another_dtype_keeps_the_stored_one(folders, values):
    model = _load(folders / f"packed-{values}", dtype=torch.float32)
    linear = model.get_submodule(UP)
    parts = {name: part.clone() for name, part in named_tensors("", linear.packed).items()}
    for changed in (linear.half(), linear.double(), linear.float(), linear.to("cpu")):
        for name, part in parts.items():
            assert changed.get_buffer(name).dtype == part.dtype
            assert torch.equal(changed.get_buffer(name), part)
    exact = _load(folders / f"plain-{values}", dtype=torch.float32)
    with reference_path():
        difference = _logits(model, IDS[:1, :4]) - _logits(exact, IDS[:1, :4])
    # The unpacked model has integers rounded to bfloat16.
    allowed = 1e-6 if values == "bf16" else 0.01
    assert difference.norm() <= allowed * _logits(exact, IDS[:1, :4]).norm()
    assert "in_features=" in repr(linear)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_quantised_experts(tmp_path, family):
    source = tiny_checkpoint(tmp_path / "dense", family, torch.bfloat16)
    quantized_checkpoint(source, tmp_path / "packed", lambda name: ".experts." in name)
    unpack(tmp_path / "packed", tmp_path / "plain")
    model, plain = _load(tmp_path / "packed"), _load(tmp_path / "plain")
    quantised = [m for m in model.modules() if isinstance(m, PackedLinear)]
    entries = model.config.quantization_config.linears
    assert len(quantised) == len(entries) > 20
    with reference_path():
        found = _logits(model)
    # Where two experts score almost the same for a token, rounding may choose the other one.
    far = (found - _logits(plain)).abs().amax(dim=-1) > 0.05 * found.abs().max()
    assert float(far.float().mean()) < 0.1
    model.save_pretrained(tmp_path / "again")
    with reference_path():
        assert torch.equal(_logits(_load(tmp_path / "again")), found)


def test_dense_linears_have_the_gradients_of_torch():
    x = torch.randn(2, 3, 30).bfloat16()
    plain, own = nn.Linear(30, 12, dtype=torch.bfloat16), DenseLinear(30, 12, dtype=torch.bfloat16)
    own.load_state_dict(plain.state_dict())
    for linear in (plain, own):
        linear(x).float().square().sum().backward()
    for left, right in zip(plain.parameters(), own.parameters(), strict=True):
        assert torch.allclose(left.grad.float(), right.grad.float(), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("values", ["bf16", "planes"])
def test_compile_and_export(folders, values):
    model = _load(folders / f"packed-{values}")
    ids = IDS[:1, :3]
    expected = _logits(model, ids)
    compiled = torch.compile(
        lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        assert torch.equal(compiled(ids), expected)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 3, 32).bfloat16()
    with torch.no_grad():
        program = torch.export.export(mlp, (x,))
        assert torch.equal(program.module()(x), mlp(x))
    assert sum("prunus.packed_linear" in str(node.target) for node in program.graph.nodes) == 3


def test_models_that_were_pickled_under_the_earlier_name_load():
    linear = PackedLinear(quantized_weight(6, 20))
    pickled = pickle.dumps(linear, protocol=0)  # a text, in which names have no lengths
    earlier = pickled.replace(b"prunus.runtime", b"prunus.packed")
    assert earlier != pickled
    again = pickle.loads(earlier)
    assert type(again) is PackedLinear
    assert torch.equal(again.dense(), linear.dense())


def test_operators_pass_torch_checks():
    x, tests = torch.randn(2, 20), ("test_schema", "test_faketensor", "test_autograd_registration")
    for packed in (_bitmap(30, 20), quantized_weight(30, 20)):
        arguments = (*operators.as_arguments(packed), PackedLinear(packed).prepared)
        torch.library.opcheck(operators.packed_linear, (x, *arguments, None), test_utils=tests)
        ids = torch.tensor([[3, 29]])
        arguments = (ids, *arguments, torch.bfloat16)
        torch.library.opcheck(operators.packed_embedding, arguments, test_utils=tests[:2])


def test_without_kernels_there_is_one_warning(folders, monkeypatch):
    monkeypatch.setenv("PRUNUS_ISA", "off")
    operators.loaded_kernels.cache_clear()
    try:
        packed = _load(folders / "packed-bf16")
        with pytest.warns(
            RuntimeWarning, match="no kernels here.*switched off by PRUNUS_ISA=off"
        ) as caught:
            logits = _logits(packed, IDS[:1, :3])
        assert len(caught) == 1
        assert torch.equal(logits, _logits(_load(folders / "plain-bf16"), IDS[:1, :3]))
    finally:
        operators.loaded_kernels.cache_clear()


def test_inputs_of_a_wrong_width_and_without_tokens():
    for packed in (_bitmap(6, 20), quantized_weight(6, 20)):
        linear = PackedLinear(packed)
        with pytest.raises(ValueError, match="width 20"):
            linear(torch.ones(1, 21))
        arguments = (*operators.as_arguments(packed), linear.prepared, None)
        with pytest.raises(ValueError, match="width 20"):
            operators.packed_linear(torch.ones(1, 40), *arguments)
        assert linear(torch.ones(0, 20).bfloat16()).shape == (0, 6)


@pytest.mark.parametrize(
    ("linears", "message"),
    [
        ({UP: [64, 32, 100, 0]}, "config.json asks for"),
        ({"model.layers.7.mlp.up_proj": [64, 32, 1024]}, "holds no tensor"),
    ],
)
def test_hostile_descriptions_do_not_load(folders, tmp_path, linears, message):
    folder = shutil.copytree(folders / "packed-bf16", tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["linears"] |= linears
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        _load(folder)


@pytest.mark.parametrize(
    ("form", "part", "damage", "message"),
    [
        ("bf16", "weight_mask", lambda part: part[0].bitwise_xor_(1), "the mask keeps"),
        ("planes", "weight", lambda part: part[:64].fill_(255), "the "),
        ("planes", "weight_classes", lambda part: part.add_(7), "a column is in class"),
    ],
)
def test_damaged_weights_do_not_load(folders, tmp_path, form, part, damage, message):
    folder = shutil.copytree(folders / f"packed-{form}", tmp_path / "packed")
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if f"{UP}.{part}" in tensors:
            damage(tensors[f"{UP}.{part}"])
            save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{UP} is damaged: {message}"):
        _load(folder)
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        _load(folder)


def test_bitmaps_and_quantised_linears_in_one_checkpoint(folders, tmp_path):
    """A pruned model whose MLPs are quantised and whose other linears are bitmaps."""
    folder = shutil.copytree(folders / "packed-bf16", tmp_path / "packed")
    other = load_file(next((folders / "packed-planes").glob("*.safetensors")))
    entries = json.loads((folders / "packed-planes" / "config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    linears = config["quantization_config"]["linears"]
    tensors = {k: v for k, v in other.items() if ".mlp." in k}
    for shard in folder.glob("*.safetensors"):
        tensors |= {k: v for k, v in load_file(shard).items() if ".mlp." not in k}
        shard.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink()
    for name in list(linears):
        if ".mlp." in name:
            linears[name] = entries["quantization_config"]["linears"][name]
    (folder / "config.json").write_text(json.dumps(config))
    model = _load(folder)
    kinds = {m.layout is None for m in model.modules() if isinstance(m, PackedLinear)}
    assert kinds == {True, False}
    model.save_pretrained(tmp_path / "again")
    unpack(tmp_path / "again", tmp_path / "plain")
    plain = _load(tmp_path / "plain")
    with reference_path():
        assert torch.equal(_logits(model), _logits(plain))


def test_without_prunus_transformers_refuses(folders, tmp_path):
    _load(folders / "packed-bf16").save_pretrained(tmp_path / "again")
    code = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as fault:
        print(type(fault).__name__, fault)
    else:
        print("loaded")
"""
    # An installed prunus needs no import, by an entry point that torch calls; see
    # test_entry_points.py. Here it is switched off.
    result = subprocess.run(
        [sys.executable, "-c", code, folders / "packed-bf16", tmp_path / "again"],
        env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    first, second = result.stdout.splitlines()
    assert first.startswith("ValueError")
    assert first.endswith(REFUSAL)
    assert second.startswith("RuntimeError"), "saved by transformers, shapes alone refuse it"
    assert "got prunus" in result.stderr, "the unknown method is named"
