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
from prunus.engine.run_options import RunOptions
from prunus.engine.run_windows import given_windows
from prunus.formats.block_bytes import scaled
from prunus.formats.compressed_tensors import TensorsCodec, integer_type
from prunus.formats.compression_recipe import CompressionRecipe
from prunus.formats.compression_record import CompressionRecord
from prunus.methods.group_fits import round_in_groups
from prunus.model.checkpoint.resolve import resolve_folder
from prunus.model.loading import load_model
from refusals import assert_refused
from tiny import shards, stored, tiny_checkpoint, token_ids
from tiny_tokenizer import VOCABULARY, byte_tokenizer

WIDE = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": VOCABULARY}
NO_PACKAGE = (
    "not installed: pip install compressed-tensors, which transformers needs for these files"
)
every_size = pytest.mark.parametrize("bits", [4, 8])


def compress(dense: Path, out: Path, bits: float | None = 4, **options) -> CompressionRecord:
    return prunus.compress(dense, out, bits, calibration=token_ids(), batch=2, **options)


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a result, each number taken from its bits."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits = config["config_groups"]["group_0"]["weights"]["num_bits"]
    found = stored(folder)
    for name in [name for name in found if name.endswith("weight_packed")]:
        key = name.removesuffix("_packed")
        packed, scale_OS, shape = (found.pop(f"{key}_{x}") for x in ("packed", "scale", "shape"))
        words = packed.numpy().view("uint32")
        values_OI = torch.tensor(
            [
                [
                    int(row[i * bits // 32] >> (i * bits % 32)) % 2**bits - 2 ** (bits - 1)
                    for i in range(shape[1])
                ]
                for row in words
            ],
            dtype=scale_OS.dtype,
        )
        found[key] = values_OI * scale_OS.repeat_interleave(shape[1] // scale_OS.shape[1], 1)
    return found


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("ct") / "dense", "llama", torch.bfloat16, **WIDE)


@every_size
def test_the_folder_holds_weights_close_to_those_of_the_source(bits, dense, tmp_path):
    data, described = given_windows(token_ids())
    recipe = CompressionRecipe(bits=bits, **described)
    planned = Compression(dense, None, recipe, RunOptions(**data)).plan().storage.file_bytes()
    record = compress(dense, tmp_path / "out", bits)
    assert planned == sum(map(len, shards(tmp_path / "out").values())) == record.size.after
    before, after = stored(dense), unpacked(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        error = float((after[name] - weight).float().norm() / weight.float().norm())
        assert after[name].dtype == weight.dtype
        assert error < (0.15 if bits == 4 else 0.01) if "proj" in name else error == 0, name
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (bits, 128, True)
    assert config["ignore"] == ["lm_head", "model.embed_tokens"]
    assert record.totals["bits"] == bits + 16 / 128
    assert "vLLM" in (tmp_path / "out" / "README.md").read_text()


@every_size
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_transformers_loads_the_same_weights(bits, dtype, tmp_path):
    pytest.importorskip("compressed_tensors", reason=NO_PACKAGE)
    dense = tiny_checkpoint(tmp_path / "dense", "llama", dtype, **WIDE)
    compress(dense, tmp_path / "out", bits)
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype="auto",
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    expected = unpacked(tmp_path / "out")
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    logits = load_model(tmp_path / "out")(token_ids()).logits
    assert torch.allclose(logits, model(token_ids()).logits, atol=0.01)


@every_size
def test_the_package_reads_the_numbers_that_were_stored(bits):
    quantizer = integer_type(bits, 32, torch.bfloat16)
    weight = round_in_groups(torch.randn(3, 64), quantizer)
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
        weight = round_in_groups(values_OI.float(), quantizer)
        packed = TensorsCodec.encode("x", weight, torch.bfloat16)["x_packed"]
        assert torch.equal(weight.dense(), values_OI.float())
        assert hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("width", [64, 96])
def test_narrow_models_have_smaller_groups(width, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16, hidden_size=width)
    compress(dense, tmp_path / "out", ignore=["*.1.mlp.*"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
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
        (dense, 3, {}, r"in 4 or 8 bits: for 3 bits name the output OUT\.gguf .* `format` mlx"),
        (dense, None, {"size": 100_000}, r"the files take [\d.]+ kB with linears in 4 bits"),
        (dense, None, {"type": "Q4_K"}, "belong to GGUF files"),
        (dense, 4, {"sparsity": 0.5}, "sparsity is not an option here"),
        (dense, 4, {"head_bits": 4}, "`head_bits`"),
        (narrow, 4, {}, "q_proj has 48 inputs, .* 32 divides: .* `ignore`"),
    ):
        assert_refused(ValueError, message, compress, model, tmp_path / "out", bits, **options)


def test_a_folder_has_this_format_and_a_size_gets_the_most_bits_that_fit(dense, tmp_path):
    sizes = {}
    for bits in (4, 8):
        record = compress(dense, tmp_path / f"{bits}", bits)
        assert (
            "format" not in json.loads((tmp_path / f"{bits}" / record.FILE).read_text())["recipe"]
        )
        sizes[bits] = sum(map(len, shards(tmp_path / f"{bits}").values()))
    for size, bits in ((sizes[4], 4), (sizes[8] - 1, 4), (sizes[8], 8), (10**8, 8)):
        record = compress(dense, tmp_path / f"{size}", None, size=size)
        assert record.size.after == sizes[bits] <= size
        assert shards(tmp_path / f"{size}") == shards(tmp_path / f"{bits}")
        assert f"in {bits} bits" in (tmp_path / f"{size}" / "README.md").read_text()


@every_size
def test_the_result_is_read_without_the_package(bits, dense, tmp_path):
    out, expected = tmp_path / "out", None
    compress(dense, out, bits)
    expected = unpacked(out)
    loaded = load_model(resolve_folder(out))
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    record = CompressionRecord.load(out)
    for linear in prunus.inspect(out, verify=True).linears:
        assert (linear.dtype, linear.bits) == (f"W{bits}A16", bits + 16 / 128)
        assert linear.zeros == record.blocks[linear.block].linears[linear.name[15:]].zeros
    assert f"{bits} bits" in prunus.report(out)._repr_html_()
    byte_tokenizer().save_pretrained(out)
    assert call("generate", out, "--prompt", "a", "--max-new-tokens", 2, "--temperature", 0).stdout


def test_weights_that_are_not_whole_are_named(dense, tmp_path):
    compress(dense, tmp_path / "out")
    shard = tmp_path / "out" / "model-00002-of-00003.safetensors"
    key = "model.layers.1.mlp.up_proj.weight"
    for part, change in (
        ("packed", lambda x: x[:, 1:]),
        ("packed", lambda x: x.float()),
        ("scale", lambda x: x[1:]),
        ("scale", lambda x: x[:, :0]),
        ("shape", lambda x: x * 0),
        ("shape", lambda x: x[:1]),
    ):
        tensors = load_file(shard)
        name = f"{key}_{part}"
        save_file(tensors | {name: change(tensors[name]).contiguous()}, tmp_path / "x.safetensors")
        folder = shutil.copytree(tmp_path / "out", tmp_path / "damaged", dirs_exist_ok=True)
        shutil.copy(tmp_path / "x.safetensors", folder / shard.name)
        assert_refused(ValueError, rf"{key}_\w+ .* do not belong together", prunus.inspect, folder)
