"""Packing checkpoints and unpacking them: lossless, resumable, and safe against damaged files."""

import contextlib
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prunus.engine.folder as folder_module
from packed_reference import prune_in_place, pruned_checkpoint
from plane_reference import quantized_checkpoint, read_planes
from prunus import pack, unpack
from prunus.model.checkpoint.reader import INDEX_NAME
from prunus.runtime.description import FORMAT_VERSION, Description
from tiny import stored, tiny_checkpoint, tiny_model


def _same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name].view(torch.int8), right[name].view(torch.int8)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_trip_is_lossless(tmp_path, dtype):
    model = prune_in_place(tiny_model(dtype=dtype))
    with torch.no_grad():  # -0.0 is a value and survives
        model.model.layers[0].mlp.up_proj.weight[0, :4] = -0.0
    model.save_pretrained(tmp_path / "pruned")
    source = tmp_path / "pruned"
    record = pack(source, tmp_path / "packed")
    assert len(record.linears) == (15 if dtype == torch.bfloat16 else 14), "coded heads shrink"
    assert all(r.packed and r.relative_error is None for r in record.linears.values())
    packed, dense = stored(tmp_path / "packed"), stored(source)
    for name, linear in record.linears.items():
        kept = dense[f"{name}.weight"].view(torch.int16).count_nonzero()
        assert linear.kept == kept
        assert linear.nbytes[1] < (0.76 if name == "lm_head" else 0.6) * linear.nbytes[0]
        parts = [tensor for key, tensor in packed.items() if key.startswith(f"{name}.")]
        assert linear.nbytes[1] == sum(t.numel() * t.element_size() for t in parts)
        assert (f"{name}.weight_codes" in packed) == (dtype == torch.bfloat16)
    unpack(tmp_path / "packed", tmp_path / "plain")
    _same_bits(stored(tmp_path / "plain"), dense)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "plain")
    )
    assert before == after


def test_int8_reports_its_error(tmp_path):
    source = pruned_checkpoint(tmp_path / "pruned")
    record = pack(source, tmp_path / "packed", "int8")
    unpack(tmp_path / "packed", tmp_path / "plain")
    dense, plain = stored(source), stored(tmp_path / "plain")
    assert dense.keys() == plain.keys()
    for name, linear in record.linears.items():
        old, new = dense[f"{name}.weight"].double(), plain[f"{name}.weight"].double()
        assert new.dtype == old.dtype
        error = float((old - new).square().sum() / old.square().sum())
        # The record counts int8's own rounding; expanding to bfloat16 rounds once more.
        assert 0 < linear.relative_error < error < 1e-4
    untouched = [name for name in dense if name.removesuffix(".weight") not in record.linears]
    assert untouched
    _same_bits({n: dense[n] for n in untouched}, {n: plain[n] for n in untouched})


def test_what_would_not_get_smaller_stays_dense(tmp_path):
    source = pruned_checkpoint(tmp_path / "pruned", dtype=torch.float16, sparsity=0.04)
    with pytest.raises(ValueError, match=r"no linear of .* would get smaller"):
        pack(source, tmp_path / "packed")
    assert not (tmp_path / "packed" / INDEX_NAME).exists()


@pytest.mark.parametrize(
    ("family", "embedding", "reason"),
    [
        ("gpt2", "transformer.wte", "stores its weight transposed"),
        ("falcon", "transformer.word_embeddings", "something other than nn.Linear"),
    ],
)
def test_other_kinds_of_linears_stay_dense(tmp_path, family, embedding, reason):
    source = pruned_checkpoint(tmp_path / "pruned", family)
    record = pack(source, tmp_path / "packed")
    dense = {name: linear for name, linear in record.linears.items() if not linear.packed}
    assert set(record.linears) - set(dense) == {embedding}
    assert len(dense) == 8
    assert all(reason in linear.reason for linear in dense.values())


def test_float32_is_told_what_to_do(tmp_path):
    source = pruned_checkpoint(tmp_path / "pruned", dtype=torch.float32)
    with pytest.raises(ValueError, match="convert it to bfloat16 first"):
        pack(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    pack(source, tmp_path / "packed", "int8")
    unpack(tmp_path / "packed", tmp_path / "plain")
    assert {t.dtype for t in stored(tmp_path / "plain").values()} == {torch.float32}


@pytest.mark.parametrize("action", ["pack", "unpack"])
def test_a_killed_conversion_goes_on(tmp_path, monkeypatch, action):
    source = pruned_checkpoint(tmp_path / "pruned")
    run = pack if action == "pack" else unpack
    if action == "unpack":
        pack(source, tmp_path / "packed")
        source = tmp_path / "packed"
    run(source, tmp_path / "whole")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    writes, save, limit = [], folder_module.save_safetensors, 0

    def counted(path, tensors, **options):
        if len(writes) == limit:
            raise KeyboardInterrupt
        writes.append(path.name)
        return save(path, tensors, **options)

    monkeypatch.setattr(folder_module, "save_safetensors", counted)
    for limit in range(3):  # noqa: B007
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "result")
        assert not (tmp_path / "result" / INDEX_NAME).exists()
    monkeypatch.setattr(folder_module, "save_safetensors", save)
    run(source, tmp_path / "result")
    assert writes == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2)], "none twice"
    assert {path.name: path.read_bytes() for path in (tmp_path / "result").iterdir()} == expected
    assert run(source, tmp_path / "result").state == "finished", "a finished one is recognised"


def test_progress_counts_shards(tmp_path):
    source = pruned_checkpoint(tmp_path / "pruned")
    seen = []
    pack(source, tmp_path / "packed", progress=lambda step: seen.append((step.done, step.total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_another_conversion_is_not_mixed_in(tmp_path):
    source = pruned_checkpoint(tmp_path / "pruned")
    pack(source, tmp_path / "packed")
    with pytest.raises(FileExistsError, match="another values"):
        pack(source, tmp_path / "packed", "int8")
    pack(source, tmp_path / "packed", "int8", overwrite=True)
    assert Description.from_dict(_quantization(tmp_path / "packed")).values == "int8"
    (tmp_path / "packed" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileExistsError, match="damaged since"):
        pack(source, tmp_path / "packed", "int8")


def _quantization(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def _rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    pack(pruned_checkpoint(root / "pruned"), root / "packed")
    return root / "packed"


@pytest.fixture
def packed(packed_once, tmp_path):
    return shutil.copytree(packed_once, tmp_path / "packed")


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": FORMAT_VERSION + 1}, "use the prunus that packed it"),
        ({"version": FORMAT_VERSION - 1}, f"this prunus reads version {FORMAT_VERSION}"),
        ({"version": float(FORMAT_VERSION)}, f"reads version {FORMAT_VERSION}"),
        ({"version": None}, f"packed in version None .* reads version {FORMAT_VERSION}"),
        ({"values": "int8"}, "must be three integers"),
        ({"values": "float64"}, "must be one of"),
        ({"values": ["int8"]}, "must be one of"),
        ({"linears": {}}, "names no packed linears"),
        ({"linears": [NAME]}, "names no packed linears"),
        ({"linears": {NAME: [64, 32]}}, "three integers"),
        ({"linears": {NAME: [64.0, 32, 1024]}}, "three integers"),
        ({"linears": {NAME: "64x32"}}, "three integers"),
        ({"linears": {NAME: [64, 32, 2049, 0]}}, "cannot have"),
        ({"linears": {NAME: [0, 32, 0, 0]}}, "cannot have"),
        ({"linears": {NAME: [2**40, 2**40, 1]}}, "cannot have"),
        ({"linears": {NAME: [64, 32, 900, 0]}}, "config.json asks for"),
        ({"linears": {NAME: [64, 32, 1024, 1025]}}, "cannot have 1025 rare"),
        ({"linears": {NAME: [64, 32, 1024]}}, "config.json asks for"),
        ({"linears": {"a..b": [64, 32, 1024]}}, "not the name of a linear"),
        ({"linears": {"model.layers.9.mlp.up_proj": [64, 32, 1024, 0]}}, "holds no tensor"),
        ({"linears": {"model.norm": [1, 1, 1, 0]}}, "config.json asks for"),
    ],
)
def test_hostile_descriptions(packed, tmp_path, changes, message):
    _check_refusal(packed, tmp_path, changes, message)


def _check_refusal(folder, tmp_path, changes, message):
    _rewrite(folder, **changes)
    with pytest.raises(ValueError, match=message):
        unpack(folder, tmp_path / "plain")
    assert not (tmp_path / "plain").exists(), "refused before any work"


@pytest.fixture(scope="module")
def quantised_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised")
    dense = tiny_checkpoint(root / "dense", dtype=torch.bfloat16)
    return quantized_checkpoint(dense, root / "packed")


ENTRY = {"shape": [64, 32], "bytes": 1000, "rows_per_chunk": 8, "codes": [[0, [1]]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": "int4"}, "must be one of"),
        ({"linears": {NAME: [64, 32, 1024]}}, "must be one of"),
        ({"linears": {NAME: {}}}, r"needs a shape \[out, in\]"),
        ({"linears": {NAME: ENTRY | {"shape": 64}}}, r"needs a shape \[out, in\]"),
        ({"linears": {NAME: ENTRY | {"bytes": 1e3}}}, "the integers bytes and rows_per_chunk"),
        ({"linears": {NAME: ENTRY | {"bytes": 0}}}, "cannot have"),
        ({"linears": {NAME: ENTRY | {"bytes": 2**63}}}, "cannot have"),
        ({"linears": {NAME: ENTRY | {"shape": [2**40, 32]}}}, "cannot have"),
        ({"linears": {NAME: ENTRY | {"shape": [64, 0]}}}, "cannot have"),
        ({"linears": {NAME: ENTRY | {"rows_per_chunk": 0}}}, "cannot have"),
        ({"linears": {NAME: ENTRY | {"codes": []}}}, "needs 1 to 4 codes"),
        ({"linears": {NAME: ENTRY | {"codes": [[0, [1]]] * 5}}}, "needs 1 to 4 codes"),
        ({"linears": {NAME: ENTRY | {"codes": "0"}}}, "needs 1 to 4 codes"),
        ({"linears": {NAME: ENTRY | {"codes": [[0, 1]]}}}, "must be a list of integers"),
        ({"linears": {NAME: ENTRY | {"codes": [[0, ["1"]]]}}}, "must be a list of integers"),
        ({"linears": {NAME: ENTRY | {"codes": [[0, [5]]]}}}, "1 to 4 bits"),
        ({"linears": {NAME: ENTRY}}, "config.json asks for"),
    ],
)
def test_hostile_descriptions_of_quantised_linears(quantised_once, tmp_path, changes, message):
    folder = shutil.copytree(quantised_once, tmp_path / "packed")
    _check_refusal(folder, tmp_path, changes, message)


def test_unpacked_quantised_weights(quantised_once, tmp_path):
    """The slow reader and the slow product give what is unpacked, and the dtype is the model's."""
    record = unpack(quantised_once, tmp_path / "plain")
    content, plain = stored(quantised_once), stored(tmp_path / "plain")
    described = Description.from_dict(_quantization(quantised_once))
    assert described.values is None
    assert described.to_dict() == _quantization(quantised_once)
    parts = {name: content[name] for name in described.tensors(NAME)}
    weight = described.weight(NAME, parts)
    levels = torch.tensor(read_planes(weight)).double()
    exact = levels * weight.steps.double() * weight.scales.double()[:, None]
    assert torch.equal(plain[f"{NAME}.weight"], exact.float().bfloat16())
    assert record.inputs.dtype == "bfloat16"
    assert record.linears[NAME].kept == int((plain[f"{NAME}.weight"] != 0).sum())
    assert set(record.linears) == set(described.linears)
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


@pytest.mark.parametrize("form", ["packed_once", "quantised_once"])
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_shards_give_clear_errors(form, request, tmp_path_factory, data):
    """A shard cut off, or with flipped bits, is refused or gives a checkpoint of the right shapes:
    no crash.
    """
    root = tmp_path_factory.mktemp("fuzz")
    folder = shutil.copytree(request.getfixturevalue(form), root / "packed")
    # Without it, the readers see the damage instead of a comparison of digests.
    (folder / "prunus-pack.json").unlink(missing_ok=True)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    shard = folder / data.draw(st.sampled_from(shards), label="shard")
    content = bytearray(shard.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    else:
        header = 8 + int.from_bytes(content[:8], "little")
        for _ in range(data.draw(st.integers(1, 4), label="flips")):
            last = header - 1 if data.draw(st.booleans(), label="header") else len(content) - 1
            place = data.draw(st.integers(0, last), label="place")
            content[place] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    shard.write_bytes(content)
    with contextlib.suppress(ValueError, FileNotFoundError):
        unpack(folder, root / "plain")
        shapes = {name: tensor.shape for name, tensor in stored(root / "plain").items()}
        assert shapes[f"{NAME}.weight"] == (64, 32)
    shutil.rmtree(root)
