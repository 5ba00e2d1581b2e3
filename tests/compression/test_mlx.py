"""`prunus compress --format mlx`: the folder that mlx-lm and LM Studio run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import prunus
from changes import edit_json
from prunus.compression.compress import Compression
from prunus.engine.calibration_windows import given_windows
from prunus.engine.run_options import RunOptions
from prunus.evaluation.inspection import stored_size
from prunus.formats.mlx import FAMILIES, affine_type, dense_weight
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.loading import load_model
from prunus.model.open_folder import OpenFolder
from prunus.rounding.compression_recipe import CompressionRecipe
from prunus.rounding.compression_record import CompressionRecord
from prunus.rounding.group_fits import round_to_nearest
from tiny import ids_file, shards, stored, tiny_checkpoint, token_ids

NO_MLX = "not installed: pip install mlx mlx-lm, on Linux 'mlx[cpu]' mlx-lm"
WIDE = {"hidden_size": 128, "intermediate_size": 192}
#: Bits -> the bytes into which mx.quantize of MLX 0.32.4 packed `weights_of(bits)`, with groups of
#: 32. Scale and bias were -1 and the largest weight.
PACKED = {
    2: "9393939393939333",
    3: "4734d64734d64734d647341e",
    4: "8fa1c3e507294b6d8fa1c3e507294b0f",
    5: "1f473578750764b948b70f053d59f11726b1e907",
    6: "3f1eab2357390790cb2bd9590f12e8335b7a1794083bfd03",
    8: "fff8f1eae3dcd5cec7c0b9b2aba49d968f88817a736c655e575049423b34ff00",
}


def weights_of(bits: int) -> torch.Tensor:
    """A row of 32 integers from 0 to the largest of these bits."""
    top = 2**bits - 1
    return torch.tensor([[*(7 * i % (top + 1) for i in range(30)), 0, top]]).float()


def compress(dense: Path, out: Path, bits: float | None = 5, **options) -> CompressionRecord:
    given = {"calibration": token_ids(), "batch": 2, "format": "mlx", "progress": False}
    return prunus.compress(dense, out, bits, **{**given, **options})


def quantization(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization"]


def quantised(folder: Path) -> set[str]:
    """The modules with a type in a result."""
    return {name for name, entry in quantization(folder).items() if isinstance(entry, dict)}


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a result, float32, each integer cut from the bits of its row."""
    tensors, described = stored(folder), quantization(folder)
    for module in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
        bits, group = described[module]["bits"], described[module]["group_size"]
        parts = [tensors.pop(f"{module}.{part}") for part in ("weight", "scales", "biases")]
        packed, scale_OS, bias_OS = parts
        rows = [int.from_bytes(row.tobytes(), "little") for row in packed.numpy()]
        shifts = range(0, scale_OS.shape[1] * group * bits, bits)
        integers_OI = torch.tensor([[row >> i & 2**bits - 1 for i in shifts] for row in rows])
        scale_OI, bias_OI = (x.float().repeat_interleave(group, 1) for x in (scale_OS, bias_OS))
        tensors[f"{module}.weight"] = scale_OI * integers_OI + bias_OI
    return tensors


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mlx") / "dense"
    return tiny_checkpoint(folder, "llama", torch.bfloat16, **WIDE)


@pytest.fixture(scope="module")
def compressed(dense) -> Path:
    """A result of 5 bits, which no test changes."""
    compress(dense, dense.parent / "compressed")
    return dense.parent / "compressed"


@pytest.mark.parametrize("bits", PACKED)
def test_bytes_are_those_that_mlx_packed(bits):
    weight_OI, top = weights_of(bits), 2**bits - 1
    packed = torch.frombuffer(bytearray.fromhex(PACKED[bits]), dtype=torch.uint32)[None]
    ends = {"x.scales": torch.tensor([[-1.0]]), "x.biases": torch.tensor([[float(top)]])}
    assert torch.equal(dense_weight("x.weight", {"x.weight": packed, **ends}, 32), weight_OI)
    # The integers of the mirrored weights are those above, with a step of 1.
    rounded = round_to_nearest(top - weight_OI, affine_type(bits, 32, torch.bfloat16))
    assert rounded.quantizer.separate(rounded.data_OB)[0].numpy().tobytes().hex() == PACKED[bits]
    assert torch.equal(rounded.dense(), top - weight_OI)


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_mlx_reads_the_numbers_that_were_stored(bits, group):
    mx = pytest.importorskip("mlx.core", reason=NO_MLX)
    rounded = round_to_nearest(torch.randn(3, 256), affine_type(bits, group, torch.bfloat16))
    packed_OB, *ends = rounded.quantizer.separate(rounded.data_OB)
    scales, biases = (mx.array(x.float().numpy()) for x in ends)
    packed = mx.array(packed_OB.numpy().view(np.uint32))
    # In float32 a product is exact, so that each weight is rounded once, as here.
    weight = mx.dequantize(packed, scales, biases, group_size=group, bits=bits)
    assert np.array_equal(np.array(weight), rounded.dense().numpy())


@pytest.mark.parametrize("tied", [False, True])
def test_the_folder_holds_weights_close_to_those_of_the_source(tied, tmp_path):
    options = WIDE | {"tie_word_embeddings": tied}
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16, **options)
    before, out = stored(dense), tmp_path / "out"
    data, described = given_windows(token_ids())
    recipe = CompressionRecipe(bits=5, format="mlx", **described)
    plan = Compression(dense, None, recipe, RunOptions(**data)).plan()
    planned = plan.storage.file_bytes()
    record = compress(dense, out)
    written = sum(map(len, shards(out).values()))
    assert 0.97 * planned < written <= planned
    assert record.size.after == written
    assert record.size.parts.keys() >= {"rounded linears", "rounded embeddings"}
    after = unpacked(out)
    assert after.keys() == before.keys()
    for name, weight in before.items():
        error = float((after[name] - weight).float().norm() / weight.float().norm())
        assert error == 0 if weight.dim() == 1 else 0 < error < 0.6, name
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["quantization_config"] == config["quantization"]
    matrices = {name.removesuffix(".weight") for name, x in before.items() if x.dim() == 2}
    assert quantised(out) == matrices
    card = (out / "README.md").read_text()
    assert "library_name: mlx" in card
    assert "mlx_lm.generate" in card


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_have_the_dtype_of_the_model_and_of_float32_bfloat16(dtype, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", dtype)
    compress(dense, tmp_path / "out")
    parts = stored(tmp_path / "out")
    kinds = {x.dtype for name, x in parts.items() if name.endswith((".scales", ".biases"))}
    assert kinds == {torch.bfloat16 if dtype == torch.float32 else dtype}
    expected = unpacked(tmp_path / "out")
    [kind] = kinds
    for name, weight in stored(open_folder(tmp_path / "out").path).items():
        assert torch.equal(weight, expected[name].to(kind if weight.dim() == 2 else dtype)), name


def test_the_files_are_at_most_as_large_as_the_size_and_use_it(dense, tmp_path):
    for size in (120_000, 220_000):
        record = compress(dense, tmp_path / str(size), None, size=size)
        written = sum(map(len, shards(tmp_path / str(size)).values()))
        assert 0.95 * size < written <= size
        assert len(set(record.types.values())) > 1
    # More than formats without groups have.
    assert compress(dense, tmp_path / "9", 9).totals["bits"] > 8
    with pytest.raises(ValueError, match=r"20.0 kB is not possible .* MLX .* 2.29 to 9.00"):
        compress(dense, tmp_path / "small", None, size=20_000)
    assert not (tmp_path / "small").exists()


def test_head_bits_hold_for_embedding_and_head(dense, tmp_path):
    compress(dense, tmp_path / "out", head_bits=8)
    described = quantization(tmp_path / "out")
    assert described["lm_head"]["bits"] == described["model.embed_tokens"]["bits"] == 8
    compress(dense, tmp_path / "none", head_bits="none")
    assert quantization(tmp_path / "none").keys().isdisjoint({"lm_head", "model.embed_tokens"})
    assert torch.equal(stored(tmp_path / "none")["lm_head.weight"], stored(dense)["lm_head.weight"])


def test_what_cannot_be_stored_is_refused_before_any_work(dense, tmp_path):
    narrow = tiny_checkpoint(tmp_path / "narrow", "llama", hidden_size=48)
    other = tiny_checkpoint(tmp_path / "other", "gpt_neox", tie_word_embeddings=False)
    gemma = tiny_checkpoint(tmp_path / "gemma", "gemma", tie_word_embeddings=False)
    gelu = tiny_checkpoint(tmp_path / "gelu", hidden_act="gelu")
    few = ["*.self_attn.*", "*.gate_proj", "*.up_proj"]
    for model, bits, options, message in (
        (dense, 2, {}, "2 bits is not possible .* take 2.29 to 9.00 bits"),
        (dense, 9.5, {}, "bits must be from 1 to 9"),
        (dense, None, {"type": "Q4_K"}, "belong to GGUF files"),
        (dense, 4, {"sparsity": 0.5}, "no file of compress gets smaller by zeros"),
        (other, 4, {}, "family gpt_neox with `tie_word_embeddings` false"),
        (gemma, 4, {}, "family gemma with `tie_word_embeddings` false"),
        (gelu, 4, {}, "hidden_act = silu or swish, and this model has gelu"),
        (narrow, 4, {}, "q_proj has 48 inputs, .* 32 divides: .* `ignore`"),
        (narrow, 4, {"ignore": few}, "lm_head has 48 inputs, .* `head_bits` none"),
    ):
        with pytest.raises((ValueError, NotImplementedError), match=message):
            compress(model, tmp_path / "out", bits, **options)
        assert not (tmp_path / "out").exists()
    compress(narrow, tmp_path / "some", 5, ignore=few, head_bits="none")
    assert quantised(tmp_path / "some") == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}


def test_other_verbs_read_the_result(dense, compressed, tmp_path):
    record = CompressionRecord.load(compressed)
    assert "5 bits" in prunus.report(compressed)._repr_html_()
    linears = {linear.name: linear for linear in prunus.inspect(compressed, verify=True).linears}
    for name, linear in linears.items():
        assert linear.dtype == record.types[name]
        # The name of a type says its bits, and the size of its groups.
        bits, group = map(int, linear.dtype.split("bit-g"))
        assert linear.bits == affine_type(bits, group, torch.bfloat16).bits
    ids_file(tmp_path / "ids.safetensors")
    scored = prunus.perplexity(
        compressed, str(tmp_path / "ids.safetensors"), seqlen=16, reference=dense, progress=False
    )
    assert 0 < scored.divergence.kl < 0.1
    files = sum(file.stat().st_size for file in compressed.glob("*.safetensors"))
    assert stored_size(OpenFolder(compressed)).file_bytes == files


@pytest.mark.parametrize("part", ["scales", "biases", "weight", "bits", "mode", "config"])
def test_folders_that_do_not_fit_their_description_are_refused(part, compressed, tmp_path):
    out, module = tmp_path / "out", "model.layers.0.mlp.up_proj"
    shutil.copytree(compressed, out)
    path = next(out.glob("model-00001-*"))
    tensors = load_file(path)
    if part == "bits":
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"][:, :7].contiguous()
    elif part == "mode":
        tensors[f"{module}.scales"] = tensors[f"{module}.scales"].view(torch.uint8)
    elif part != "config":
        tensors[f"{module}.{part}"] = tensors[f"{module}.{part}"][:5].contiguous()
    save_file(tensors, path)
    if part == "config":
        open_folder(out)
        described = json.loads((out / "config.json").read_text())["quantization"]
        described[module]["bits"] += 1
        edit_json(out / "config.json", quantization=described)
    with pytest.raises(ValueError, match=r"up_proj.weight is not stored as integers"):
        open_folder(out)


def test_positions_have_the_keys_that_mlx_lm_reads(tmp_path):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    local = {"rope_type": "default", "rope_theta": 7.0}
    layers = {"full_attention": scaled, "sliding_attention": local}
    for family, rope in (("llama", scaled), ("gemma3_text", layers)):
        options = {"rope_parameters": rope, **WINDOWS.get(family, {})}
        dense = tiny_checkpoint(tmp_path / f"dense {family}", family, **options)
        compress(dense, tmp_path / family)
        config = json.loads((tmp_path / family / "config.json").read_text())
        assert config["rope_theta"] == 500.0
        assert config["rope_scaling"]["factor"] == 2.0
        assert config["rope_scaling"]["type"] == "linear"
        before = json.loads((dense / "config.json").read_text())
        assert config["rope_parameters"] == before["rope_parameters"]
        assert config.get("rope_local_base_freq", 7.0) == 7.0


#: Keys that mlx-lm needs for some of the tiny models.
TINY = {"mlp_bias": False, "post_norm": False, "qk_norm": True}
#: Windows that reach over all positions, which mlx-lm leaves out, and the blocks that it assumes.
WINDOWS = {family: {"sliding_window": 64} for family in ("mistral", "gemma2")} | {
    "gemma3_text": {"layer_types": ["sliding_attention"] * 2}
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_mlx_lm_computes_what_is_computed_here(family, tmp_path):
    mx = pytest.importorskip("mlx.core", reason=NO_MLX)
    mlx_lm = pytest.importorskip("mlx_lm.utils", reason=NO_MLX)
    mx.set_default_device(mx.cpu)
    for tied in FAMILIES[family]:
        options = {"tie_word_embeddings": tied, **WINDOWS.get(family, {})}
        dense = tiny_checkpoint(tmp_path / f"dense{tied}", family, **options)
        out = tmp_path / f"out{tied}"
        compress(dense, out, 6)
        model, _ = mlx_lm.load_model(out, model_config=TINY)
        modules = {name for name, x in model.named_modules() if "Quantized" in type(x).__name__}
        assert modules == quantised(out)
        ids = token_ids()[:, :8]
        logits = np.array(model(mx.array(ids.numpy())).astype(mx.float32))
        with torch.no_grad():
            expected = load_model(open_folder(out))(ids).logits.float().numpy()
        # mlx-lm rounds rows of the embedding to bfloat16.
        assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()
