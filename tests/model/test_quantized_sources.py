"""Checkpoints in few bits, read as the dense checkpoints that they stand for."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")

import gguf
import transformers

import prunus
from changes import edit_json, edit_tensors
from command_line import call
from gguf_cases import gguf_checkpoint
from prunus.evaluation.inspection import stored_size
from prunus.model.checkpoint.tensor_files import Checkpoint
from prunus.model.loading import load_model
from prunus.model.open_folder import OpenFolder
from quantized import FORMATS, FUSED, gpt_oss_experts, gptq, quantize, tensors_of
from recovery_cases import recover, training_text
from refusals import assert_refused
from stopping import interrupt
from tiny import shards, stored, tiny_checkpoint, token_ids

NO_PACKAGE = "not installed: pip install compressed-tensors"
every_format = pytest.mark.parametrize("name", FORMATS)
KEY = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "source"
    return gguf_checkpoint(folder, hidden_size=32, intermediate_size=64)


def prune(model: Path, out: Path, **options) -> None:
    prunus.prune(model, out, calibration=token_ids(), batch=2, **options)


def assert_same_bits(found, expected) -> None:
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert found[key].dtype == weight.dtype
        pair = [tensor.contiguous().view(torch.uint8) for tensor in (found[key], weight)]
        assert torch.equal(*pair), key


@every_format
def test_each_weight_has_the_value_of_its_formula_and_is_pruned_as_that(name, source, tmp_path):
    few, dense = quantize(source, tmp_path, name)
    checkpoint = OpenFolder(few).checkpoint
    assert_same_bits(dict(checkpoint.read(checkpoint.tensors)), stored(dense))
    assert torch.equal(
        torch.cat(list(checkpoint.pieces(f"{KEY}.weight", 64))),
        stored(dense)[f"{KEY}.weight"].flatten(),
    )
    for model in (few, dense):
        prune(model, model.parent / "out")
    assert shards(few.parent / "out") == shards(dense.parent / "out")
    config = json.loads((few.parent / "out" / "config.json").read_text())
    assert config == json.loads((dense.parent / "out" / "config.json").read_text())
    # Older and newer programs name the dtype in two ways; without any it is bfloat16.
    edit_json(few / "config.json", dtype=None, torch_dtype="float32")
    assert OpenFolder(few).checkpoint.tensors[f"{KEY}.weight"].dtype == torch.float32
    edit_json(few / "config.json", torch_dtype=None)
    assert OpenFolder(few).checkpoint.tensors[f"{KEY}.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "name"),
    [("mixtral", "fp8 of blocks"), ("mixtral", "integers of 4 bits"), ("mixtral", "gptq in 4 bits"),
     ("gpt_oss", FUSED)],
)  # fmt: skip
def test_mixtures_are_pruned_as_their_dense_weights_and_resumed(family, name, tmp_path):
    options = {"moe_intermediate_size": 32, "intermediate_size": 32}
    source = tiny_checkpoint(tmp_path / "source", family, torch.bfloat16, **options)
    few, dense = quantize(source, tmp_path, name)
    prune(dense, tmp_path / "expected")
    interrupt(prune, few, tmp_path / "out")
    prune(few, tmp_path / "out", resume=True)
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")
    for model in (few, dense):
        small = {"blocks": 1, "experts": 2, "calibration": token_ids(), "batch": 2}
        prunus.shrink(model, model.parent / "small", **small)
    assert shards(few.parent / "small") == shards(dense.parent / "small")


RESULTS = {"x.gguf": {"type": "Q4_0"}, "packed": {"bits": 8}, "mlx": {"bits": 8, "format": "mlx"}}


def test_every_command_takes_them(source, tmp_path):
    few, dense = quantize(source, tmp_path, "gptq in 4 bits")
    (few / "quantize_config.json").write_text("{}")
    text = training_text(tmp_path)
    for model in (few, dense):
        here = model.parent
        for name, more in RESULTS.items():
            prunus.compress(model, here / name, calibration=token_ids(), batch=2, **more)
        prune(model, here / "pruned")
        # Rounding made its zeros, so none is kept.
        recover(model, here / "recovered", "full", text)
        call("plan", model, "--sparsity", 0.5, "--seqlen", 16)
    here, there = few.parent, dense.parent
    # The record in the file has the fingerprint and the size of its source.
    found, expected = (
        [(x.name, x.tensor_type, x.data.tobytes()) for x in gguf.GGUFReader(at / "x.gguf").tensors]
        for at in (here, there)
    )
    assert found == expected
    for name in ("packed", "mlx", "pruned", "recovered"):
        assert shards(here / name) == shards(there / name)
        assert not (here / name / "quantize_config.json").exists()
        config = (here / name / "config.json").read_text()
        assert json.loads(config) == json.loads((there / name / "config.json").read_text())
    ids = torch.randint(3, 128, (3, 24))
    for stream in (True, False):
        scores = [prunus.perplexity(x, ids, seqlen=24, stream=stream) for x in (few, dense)]
        assert scores[0].loss == scores[1].loss
    # What compress writes is read in the same way.
    assert prunus.inspect(here / "packed").linears[0].dtype == "W8A16"
    assert stored_size(OpenFolder(few)).bits_per_weight < 8
    assert stored_size(OpenFolder(dense)).bits_per_weight == 16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "fp8 of blocks"), ("gpt_oss", FUSED), ("llama", "nvfp4"),
     ("llama", "mxfp4"), ("llama", "int8"), ("llama", "float8 of rows"),
     *(("llama", f"integers of {bits} bits") for bits in range(1, 9))],
)  # fmt: skip
def test_transformers_loads_the_same_weights(family, name, tmp_path):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    options = {"intermediate_size": 96, "hidden_size": 96}
    source = tiny_checkpoint(tmp_path / "source", family, torch.bfloat16, **options)
    few, _ = quantize(source, tmp_path, name)
    more = {}
    described = json.loads((few / "config.json").read_text())["quantization_config"]
    if described["quant_method"] == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason=NO_PACKAGE)
        more = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    theirs = AutoModelForCausalLM.from_pretrained(few, dtype="auto", **more).state_dict()
    ours = load_model(OpenFolder(few)).state_dict()
    assert_same_bits(ours, {key: theirs[key] for key in ours})


def test_the_package_gguf_has_the_same_values_of_mxfp4():
    parts, dense = gpt_oss_experts((1, 32, 3))
    # A block of llama.cpp: the exponent, then bytes of values i and i + 16.
    codes = torch.stack([parts["_blocks"] & 15, parts["_blocks"] >> 4], -1).flatten(-2)[0, :, 0]
    blocks = torch.cat([parts["_scales"][0], codes[:, :16] | codes[:, 16:] << 4], 1)
    theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert torch.equal(torch.tensor(theirs), dense[0].T)


def damaged(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone().float()
    changed.view(-1)[-1] = value
    return changed.to(tensor.dtype)


BAD = [
    ("gptq in 4 bits", "scales", None, "scales is missing"),
    ("gptq in 4 bits", "qzeros", None, "qzeros is missing"),
    ("gptq in 4 bits", "scales", lambda x: x[1:], r"has shape \(1, 64\), and \(2, 64\) fits"),
    ("gptq in 4 bits", "scales", lambda x: damaged(x, torch.nan), "holds a scale that is 0 or no"),
    ("gptq in 4 bits", "g_idx", lambda x: damaged(x, 2), "has a group beyond the 2 that have"),
    ("gptq in 4 bits", "g_idx", lambda x: damaged(x, -1), "has a group beyond the 2 that have"),
    ("gptq in 4 bits", "qweight", lambda x: x.float(), "and such a part in torch.int32"),
    ("gptq in 4 bits", "qweight", lambda x: x[0], r"has shape \(64,\), which no such part has"),
    ("awq in 4 bits", "scales", lambda x: damaged(x, 0), "holds a scale that is 0 or no finite"),
    ("awq in 4 bits", "qzeros", lambda x: x[:, :-1], "prunus reads codes of"),
    ("fp8 of blocks", "weight_scale_inv", None, "weight_scale is missing"),
    ("fp8 of blocks", "weight_scale_inv", lambda x: x[:1], r"has shape .* and \(3, 2\) fits the"),
    ("fp8 of rows", "weight_scale", lambda x: x[1:], r"has shape .* and \(64, 1\) fits the other"),
    ("nvfp4", "weight_scale", lambda x: damaged(x, 0), "holds a scale that is 0"),
    ("nvfp4", "weight_global_scale", None, "weight_global_scale is missing"),
    ("mxfp4", "weight_scale", lambda x: damaged(x, 255), "holds a scale that is 0 or no finite"),
    ("integers of 3 bits", "weight_shape", lambda x: x * 2, r"has shape .* and the weight \(128"),
    ("integers of 3 bits", "weight_zero_point", lambda x: x[1:], "fits the other parts"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "part", "change", "words"), BAD)
def test_parts_that_do_not_belong_together(name, part, change, words, source, tmp_path):
    few, _ = quantize(source, tmp_path, name)

    def damage(tensors):
        old = tensors.pop(f"{KEY}.{part}")
        if change is not None:
            tensors[f"{KEY}.{part}"] = change(old).contiguous()

    edit_tensors(few, damage)
    assert_refused(ValueError, rf"{KEY}\..*{words}", prune, few, tmp_path / "out")


def packed(**changes) -> dict:
    return tensors_of("pack-quantized", 4, **{"group_size": 32, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gptq in 4 bits", {"bits": 8}, "has codes of 4 bits, and config.json says 8"),
        ("gptq in 4 bits", {"bits": 3}, "gptq in 3 bits is none that .* the program that made it"),
        ("gptq in 4 bits", {"group_size": 32}, "has 4 groups, and group_size 32 makes 2"),
        ("gptq in 4 bits", {"checkpoint_format": "marlin"}, "in the format 'marlin', and prunus"),
        ("gptq in 4 bits", {"quant_method": "fp8"}, "by fp8, and no tensor is stored so"),
        ("awq in 4 bits", {"version": "gemv"}, "in the version 'gemv', and prunus reads gemm"),
        ("gptq without g_idx", {"group_size": 16}, "has 3 groups, and group_size 16 makes 4"),
        ("gptq without g_idx", {"desc_act": True}, "g_idx is missing, and desc_act"),
        ("gptq_v2 in 4 bits", {"desc_act": False}, "g_idx gives the groups an order, and desc_act"),
        ("gptq in 4 bits", {"sym": True}, "qzeros holds zero points other than 8, and sym allows"),
        ("awq in 4 bits", {"zero_point": False}, "zeros holds zero points other than 8, and zero_"),
        ("awq in 4 bits", {"extra_config": {KEY: {"bits": 3}}}, rf"{KEY} is .* awq in 3 bits"),
        ("awq in 4 bits", {"extra_config": {"(": {"bits": 8}}}, r"'\(' in the .* is no pattern"),
        ("awq in 4 bits", {"data_type": "fp8_to_int_sym"}, "awq in 4 bits of fp8_to_int_sym is no"),
        ("gptq in 4 bits", {"rotation_config": {"block_size": 32}}, r"transforms .*\(rotation_con"),
        ("gptq in 4 bits", {"spinquant_config": {"r1": True}}, r"transforms .*\(spinquant_config"),
        ("gptq in 4 bits", {"dual_scale": 1}, "prunus does not know whether dual_scale in its"),
        ("gptq in 4 bits", {"dynamic": {"a": {"codes": 1}}}, "not know whether codes in its"),
        ("fp8 of blocks", {"weight_block_size": 32}, "blocks of .*, which are no two numbers"),
        ("fp8 of blocks", {"weight_block_size": [32]}, "blocks of .*, which are no two numbers"),
        ("fp8 of blocks", {"weight_block_size": [16, 16]}, r"fits the other parts"),
        ("integers of 3 bits", tensors_of("pack-quantized", 4), "of 3 bits of type int, which"),
        ("integers of 4 bits", packed(group_size=128), "strategy group group_size 128"),
        ("integers of 4 bits", packed(strategy="channel"), r"shape \(32, 2\), .* strategy channel"),
        ("integers of 4 bits", packed(actorder="group"), "_g_idx is missing, and actorder says"),
        ("integers of 4 bits", packed(symmetric=False), "_zero_point is missing, and symmetric sa"),
        ("integers of 4 bits", packed(new_field="x"), "not know whether new_field in its"),
        ("integers of 5 bits", packed(num_bits=5), "holds zero points other than 16, and symm"),
        ("int8", tensors_of("int-quantized", 8, "float"), "of the type int, which config.json"),
        ("int8", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse storage, which"),
        ("int8", {"quant_method": "bitsandbytes"}, r"quant_method bitsandbytes is none .*dequant"),
        ("int8", {"quant_method": None}, "quant_method None is none that prunus reads"),
    ],
)  # fmt: skip
def test_a_configuration_that_contradicts_the_tensors(name, changes, words, source, tmp_path):
    few, _ = quantize(source, tmp_path, name)
    described = json.loads((few / "config.json").read_text())["quantization_config"]
    edit_json(few / "config.json", quantization_config=described | changes)
    assert_refused(ValueError, words, prune, few, tmp_path / "out")


#: What AutoRound 0.16.1 writes beside the fields that say what its weights mean.
OF_AUTO_ROUND = {
    "quant_method": "auto-round", "data_type": "int", "iters": 0, "autoround_version": "0.16.1",
    "block_name_to_quantize": "model.layers", "low_gpu_mem_usage": True, "act_bits": 8,
    "extra_config": {"lm_head": {"bits": 16, "data_type": "fp"}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("gptq in 4 bits", OF_AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"}),
        ("gptq without g_idx", OF_AUTO_ROUND | {"packing_format": "auto_round:gptq"}),
        ("gptq_v2 in 4 bits", OF_AUTO_ROUND | {"packing_format": "auto_round"}),
        ("awq in uneven groups", OF_AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}),
        ("gptq in 4 bits", transformers.GPTQConfig(4, group_size=16, sym=False).to_dict()),
        ("awq in 4 bits", transformers.AwqConfig(4, 16, modules_to_not_convert=["x"]).to_dict()),
        ("fp8 of blocks", transformers.FineGrainedFP8Config(weight_block_size=(24, 24)).to_dict()),
    ],
)
def test_what_other_programs_write_beside_the_layout_changes_nothing(
    name, described, source, tmp_path
):
    few, dense = quantize(source, tmp_path, name)
    before = json.loads((few / "config.json").read_text())["quantization_config"]
    before.pop("checkpoint_format", None)
    edit_json(few / "config.json", quantization_config=before | described)
    assert torch.equal(
        OpenFolder(few).checkpoint.whole(f"{KEY}.weight"), stored(dense)[f"{KEY}.weight"]
    )
    assert Checkpoint(few).fingerprint == OpenFolder(few).checkpoint.fingerprint


@pytest.mark.parametrize(
    "rules",
    [
        {"extra_config": {KEY: {"bits": 8, "group_size": 24, "super_bits": None}}},
        {"extra_config": {r".*1\.mlp\.up_.*": {"bits": 8, "group_size": 24}}},
        {"dynamic": {"-:lm_head": {}, r"+:.*\.1\.mlp\.up_": {"bits": 8, "group_size": 24}}},
    ],
)
def test_some_linears_have_other_bits_and_groups(rules, source, tmp_path):
    few, _ = quantize(source, tmp_path, "gptq without g_idx")
    parts, weight = gptq((64, 32), 8, "gptq", ordered=True, wide=24)
    edit_tensors(few, lambda x: x.update({f"{KEY}.{y}": z.contiguous() for y, z in parts.items()}))
    described = {"quant_method": "gptq", "bits": 4, "group_size": 24}
    edit_json(few / "config.json", quantization_config=described | rules)
    assert torch.equal(OpenFolder(few).checkpoint.whole(f"{KEY}.weight"), weight.bfloat16())


def test_a_group_of_compressed_tensors_is_chosen_by_the_name_of_a_module(source, tmp_path):
    few, dense = quantize(source, tmp_path, "integers in uneven groups")
    described = tensors_of("pack-quantized", 4, group_size=24, symmetric=False)
    # Both make two groups of 32 inputs, 16 and 16 or 24 and 8.
    other = tensors_of("pack-quantized", 4, group_size=16, symmetric=False)["config_groups"]
    groups = {"group_1": other["group_0"], **described["config_groups"]}
    groups["group_0"] = groups["group_0"] | {"targets": [KEY, r"re:.*\.layers\..*"]}
    edit_json(few / "config.json", quantization_config=described | {"config_groups": groups})
    assert torch.equal(
        OpenFolder(few).checkpoint.whole(f"{KEY}.weight"), stored(dense)[f"{KEY}.weight"]
    )
