"""`prunus compress` to a folder: integers for transformers, vLLM and SGLang."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunus
from command_line import call
from prunus.compression.compress import Compression
from prunus.engine.calibration_windows import given_windows
from prunus.engine.run_options import RunOptions
from prunus.formats.block_bytes import scaled
from prunus.formats.compressed_tensors import TensorsCodec, fp4_type, integer_type
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.loading import load_model
from prunus.rounding.compression_recipe import CompressionRecipe
from prunus.rounding.compression_record import CompressionRecord
from prunus.rounding.group_fits import round_to_nearest
from refusals import assert_refused
from tiny import shards, stored, tiny_checkpoint, token_ids
from tiny_tokenizer import VOCABULARY, byte_tokenizer

WIDE = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": VOCABULARY}
NO_PACKAGE = (
    "not installed: pip install compressed-tensors, which transformers needs for these files"
)
FP4 = [{"type": "NVFP4"}, {"type": "MXFP4"}]
every_size = pytest.mark.parametrize("bits", [4, 8])


def compress(dense: Path, out: Path, bits: float | None = 4, **options) -> CompressionRecord:
    return prunus.compress(dense, out, bits, calibration=token_ids(), batch=2, **options)


def planned(dense: Path, bits: float):
    """The plan of a run of `compress`."""
    data, calibration = given_windows(token_ids())
    recipe = CompressionRecipe(bits=bits, **calibration)
    return Compression(dense, None, recipe, RunOptions(**data)).plan()


def described(folder: Path) -> dict:
    """What the configuration of a result says of its linears."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def e2m1(code: int) -> float:
    """The number that four bits of FP4 are: a sign, two bits of an exponent, one of a mantissa."""
    exponent, half = code >> 1 & 3, code & 1
    magnitude = (1 + half / 2) * 2.0 ** (exponent - 1) if exponent else half / 2
    return -magnitude if code & 8 else magnitude


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a result, each number taken from its bits."""
    found, groups = stored(folder), described(folder)["config_groups"].values()
    for name in [name for name in found if name.endswith("weight_packed")]:
        key = name.removesuffix("_packed")
        packed, scale_OS = found.pop(name), found.pop(f"{key}_scale")
        [about] = [x["weights"] for x in groups if {"Linear", key[:-7]} & set(x["targets"])]
        bits, columns = about["num_bits"], scale_OS.shape[1] * about["group_size"]
        rows = [int.from_bytes(row.tobytes(), "little") for row in packed.numpy()]
        codes = [[row >> i * bits & 2**bits - 1 for i in range(columns)] for row in rows]
        dtype = torch.bfloat16
        if about["type"] == "int":
            assert found.pop(f"{key}_shape").tolist() == [len(packed), columns]
            values_OI, dtype = torch.tensor(codes) - 2 ** (bits - 1), scale_OS.dtype
        else:
            values_OI = torch.tensor([[e2m1(code) for code in row] for row in codes])
            if scale_OS.dtype == torch.uint8:
                scale_OS = 2.0 ** (scale_OS.double() - 127)
            else:
                scale_OS = scale_OS.double() / found.pop(f"{key}_global_scale").double()
        scale_OI = scale_OS.double().repeat_interleave(about["group_size"], 1)
        found[key] = (values_OI * scale_OI).to(dtype)
    return found


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("ct") / "dense", "llama", torch.bfloat16, **WIDE)


@every_size
def test_the_folder_holds_weights_close_to_those_of_the_source(bits, dense, tmp_path):
    expected, record = planned(dense, bits).storage, compress(dense, tmp_path / "out", bits)
    written = sum(map(len, shards(tmp_path / "out").values()))
    assert expected.file_bytes() == written == record.size.after
    before, after = stored(dense), unpacked(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        error = float((after[name] - weight).float().norm() / weight.float().norm())
        assert after[name].dtype == weight.dtype
        assert error < (0.15 if bits == 4 else 0.01) if "proj" in name else error == 0, name
    config = described(tmp_path / "out")
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (bits, 128, True)
    assert config["ignore"] == ["lm_head", "model.embed_tokens"]
    assert record.totals["bits"] == bits + 16 / 128
    assert "vLLM" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [*FP4, {"bits": 4}, {"bits": 8}, {"bits": 3.6}], ids=str)
def test_transformers_loads_the_same_weights(options, dtype, tmp_path):
    pytest.importorskip("compressed_tensors", reason=NO_PACKAGE)
    dense = tiny_checkpoint(tmp_path / "dense", "llama", dtype, **WIDE)
    compress(dense, tmp_path / "out", **{"bits": None} | options)
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    # With `dequantize` version 5.24 takes the first of several types for all linears.
    settings = CompressedTensorsConfig(dequantize=options != {"bits": 3.6})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", quantization_config=settings
    )
    # The first tokens unpack all weights, if they are not yet.
    logits, expected = model(token_ids()).logits, unpacked(tmp_path / "out")
    found = model.state_dict()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight.to(found[name].dtype)), name
    ours = load_model(open_folder(tmp_path / "out"))(token_ids()).logits
    assert torch.allclose(ours, logits, atol=0.01)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_package_reads_the_numbers_that_were_stored(bits):
    quantizer = integer_type(bits, 32, torch.bfloat16)
    weight = round_to_nearest(torch.randn(3, 64), quantizer)
    parts = TensorsCodec.encode("x.weight", weight, torch.bfloat16)
    packed, scale_OS, shape = parts.values()
    lowest_OS = scale_OS.float() * -(2 ** (bits - 1))
    read_OI = scaled(packed.view(torch.uint8), bits, scale_OS, lowest_OS)
    assert torch.equal(read_OI, weight.dense())
    compressors = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason=NO_PACKAGE
    )
    values_OI = compressors.unpack_from_int32(packed, bits, torch.Size(shape.tolist()))
    dense_OI = values_OI.float() * scale_OS.float().repeat_interleave(32, 1)
    assert torch.equal(dense_OI, weight.dense())


def test_the_bytes_are_those_that_the_package_wrote():
    # Values from lowest to highest, packed by version 0.20.1 of compressed-tensors.
    for bits, digest in ((4, "f2ccabb7e6059b71"), (8, "40aff2e9d2d8922e")):
        quantizer = integer_type(bits, 256, torch.bfloat16)
        values_OI = torch.arange(256)[None] % 2**bits - 2 ** (bits - 1)
        weight = round_to_nearest(values_OI.float(), quantizer)
        packed = TensorsCodec.encode("x", weight, torch.bfloat16)["x_packed"]
        assert torch.equal(weight.dense(), values_OI.float())
        assert hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("width", [64, 96])
def test_narrow_models_have_smaller_groups(width, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16, hidden_size=width)
    compress(dense, tmp_path / "out", ignore=["*.1.mlp.*"])
    config = described(tmp_path / "out")
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == math.gcd(width, 64)
    assert [name for name in config["ignore"] if "proj" in name] == [
        f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")
    ]
    assert torch.equal(
        stored(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"],
        stored(dense)["model.layers.1.mlp.up_proj.weight"],
    )


def test_what_cannot_be_stored_is_refused_before_any_work(dense, tmp_path):
    narrow = tiny_checkpoint(tmp_path / "narrow", "llama", hidden_size=48)
    for model, bits, options, message in (
        (dense, 2.1, {}, r"2\.1 bits is not possible in .* its types take 2\.12 to 8\.50 bits"),
        (
            dense,
            None,
            {"size": 100_000},
            r"take 2\.12 to .* per weight, and such files [\d.]+ kB to",
        ),
        (dense, None, {"size": 10**8}, "100.0 MB is not possible in a compressed-tensors folder"),
        (dense, 3, {"ignore": ["*.1.*.k_proj"]}, r"join .*1.self_attn.q_proj and .*k_proj, which"),
        (dense, None, FP4[0] | {"ignore": ["*.1.*.up_proj"]}, "let `ignore` match both or none"),
        (dense, None, {"type": "Q4_K"}, "belong to GGUF files"),
        (dense, 4, {"sparsity": 0.5}, "sparsity is not an option here"),
        (dense, 4, {"head_bits": 4}, "`head_bits`"),
        (narrow, 4, {}, "q_proj has 48 inputs, .* 32 divides: .* `ignore`"),
    ):
        assert_refused(ValueError, message, compress, model, tmp_path / "out", bits, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_size_gets_the_types_of_least_loss_and_joined_linears_share_theirs(dtype, tmp_path):
    dense, out = tiny_checkpoint(tmp_path / "dense", "llama", dtype, **WIDE), tmp_path / "out"
    uniform = compress(dense, tmp_path / "uniform")
    assert set(uniform.types.values()) == {"W4A16"}
    assert "format" not in json.loads((tmp_path / "uniform" / uniform.FILE).read_text())["recipe"]
    record = compress(dense, out, None, size=uniform.size.after)
    assert 0.99 * uniform.size.after < record.size.after <= uniform.size.after
    assert record.size.after == sum(map(len, shards(out).values()))
    for one, other in (("self_attn.q_proj", "self_attn.k_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for block in ("model.layers.0", "model.layers.1"):
            assert record.types[f"{block}.{one}"] == record.types[f"{block}.{other}"]
    assert len(described(out)["config_groups"]) == len(set(record.types.values())) > 1
    loaded, expected = load_model(open_folder(out)).state_dict(), unpacked(out)
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.items())
    assert "2 to 8" in (out / "README.md").read_text()


def test_all_experts_of_a_block_share_a_type(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "mixtral", torch.bfloat16)
    plan = planned(dense, 3)
    sets = [weight.modules for weight in plan.storage.weights.values()]
    assert sorted(name for x in sets for name in x) == sorted(plan.selected_linears())
    for index in (0, 1):
        [experts] = [x for x in sets if any(f"{index}.mlp.experts.0" in name for name in x)]
        assert len(experts) == sum(f".{index}.mlp.exp" in x for x in plan.selected_linears()) > 3


@pytest.mark.parametrize("options", FP4, ids=str)
def test_fp4_is_stored_and_described_as_the_package_does(options, dense, tmp_path):
    out, kind = tmp_path / "out", options["type"]
    record = compress(dense, out, None, **options)
    assert record.totals["bits"] == {"NVFP4": 4.5, "MXFP4": 4.25}[kind]
    about = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
    about |= {
        "NVFP4": {
            "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"
        },
        "MXFP4": {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    }[kind]  # fmt: skip
    config = described(out)
    assert config["format"] == f"{kind.lower()}-pack-quantized"
    assert config["config_groups"] == {"group_0": {"targets": ["Linear"], "weights": about}}
    tensors, before = stored(out), stored(dense)
    loaded, expected = load_model(open_folder(out)).state_dict(), unpacked(out)
    for name, weight in loaded.items():
        assert torch.equal(weight, expected[name])
        assert float((weight - before[name]).norm() / before[name].norm()) < 0.16
        if f"{name}_packed" in tensors and kind == "NVFP4":
            assert float(tensors[f"{name}_scale"].float().min()) >= 0
            joined = name.replace("k_proj", "q_proj").replace("up_proj", "gate_proj")
            assert tensors[f"{name}_global_scale"] == tensors[f"{joined}_global_scale"]
    assert {x.dtype for x in prunus.inspect(out).linears} == {kind}


@pytest.mark.parametrize("magnitude", [0.0, 1e-36, 1e-20, 1.0, 1e10])
def test_a_global_scale_suits_weights_of_any_magnitude(magnitude):
    weight_OI = torch.randn(4, 64) * magnitude
    rounded = round_to_nearest(weight_OI, fp4_type("NVFP4", float(weight_OI.abs().max())))
    assert float((rounded.dense() - weight_OI).norm()) <= 0.12 * float(weight_OI.norm())


@every_size
def test_the_result_is_read_without_the_package(bits, dense, tmp_path):
    compress(dense, out := tmp_path / "out", bits)
    loaded, expected = load_model(open_folder(out)).state_dict(), unpacked(out)
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.items())
    record = CompressionRecord.load(out)
    for linear in prunus.inspect(out, verify=True).linears:
        assert (linear.dtype, linear.bits) == (f"W{bits}A16", bits + 16 / 128)
        assert linear.zeros == record.blocks[linear.block].linears[linear.name[15:]].zeros
    assert f"{bits} bits" in prunus.report(out)._repr_html_()
    byte_tokenizer().save_pretrained(out)
    assert call("generate", out, "--prompt", "a", "--max-new-tokens", 2, "--temperature", 0).stdout


def test_weights_that_are_not_whole_are_named(dense, tmp_path):
    compress(dense, tmp_path / "out")
    shard, key = tmp_path / "out" / "model-00002-of-00003.safetensors", "model.layers.1.mlp.up_proj"
    for part, change in (
        ("packed", lambda x: x[:, 1:]),
        ("packed", lambda x: x.float()),
        ("scale", lambda x: x[1:]),
        ("scale", lambda x: x[:, :0]),
        ("shape", lambda x: x * 0),
        ("shape", lambda x: x[:1]),
    ):
        tensors, name = load_file(shard), f"{key}.weight_{part}"
        folder = shutil.copytree(tmp_path / "out", tmp_path / "damaged", dirs_exist_ok=True)
        save_file(tensors | {name: change(tensors[name]).contiguous()}, folder / shard.name)
        assert_refused(
            ValueError, rf"{key}.weight_\w+ .* do not belong together", prunus.inspect, folder
        )
