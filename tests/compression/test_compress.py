"""`prunus compress`: the file takes the bits asked for, and loads as what was computed."""

import fnmatch
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from prunus.formats.packed.format import PackedFormat
from prunus.runtime.description import Description, StoredTensor
from prunus.runtime.linear import PackedEmbedding
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import prunus
import reference
from command_line import call
from pictures import pictures, save_classifier
from prunus import unpack
from prunus.engine.linear_job import describe_plan, plan_run
from prunus.engine.loss_sensitivity import measuring_memory
from prunus.engine.memory import BlockMemory, Memory
from prunus.engine.options import RunOptions
from prunus.engine.output import MEASUREMENT
from prunus.evaluation.inspection import holds
from prunus.formats.recipe import CompressionRecipe
from prunus.formats.records import CompressionRecord
from prunus.model.checkpoint.atomic_files import read_json
from prunus.model.checkpoint.reader import Checkpoint
from prunus.pruning.manifest import Manifest
from prunus.pruning.recipe import Recipe
from prunus.pruning.run import PlainTensors
from prunus.reporting.run_sections import run_section
from prunus.reporting.tables import plan_facts
from prunus.runtime import PackedLinear, reference_path
from scripts import run_script
from stopping import StopError, stop_after
from tiny import shards, tiny_checkpoint, tiny_model, token_ids, weights

WIDER = {"hidden_size": 64, "intermediate_size": 128}
IDS = token_ids(2, 12)
BLOCKS = "model-0000[12]-of-00003.safetensors"


def compress(dense: Path, out: Path, bits: float = 4.0, **options) -> Manifest:
    return prunus.compress(dense, out, bits, **{"calibration": token_ids(), "batch": 2, **options})


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def bits_in_file(folder: Path) -> float:
    """Bits per weight of the packed linears of the blocks: all their tensors in the shards."""
    described = Description.from_dict(read_json(folder / "config.json")["quantization_config"])
    checkpoint = Checkpoint(folder)
    described.check_tensors(
        {name: StoredTensor(info.shape, info.dtype) for name, info in checkpoint.tensors.items()}
    )
    linears = [name for name in described.linears if ".layers." in name]
    nbytes = sum(
        checkpoint.tensors[part].nbytes for name in linears for part in described.tensors(name)
    )
    return 8 * nbytes / sum(math.prod(described.linears[name][:2]) for name in linears)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compress") / "dense"
    return tiny_checkpoint(folder, "llama", torch.bfloat16, tie_word_embeddings=True, **WIDER)


@pytest.fixture(scope="module")
def compressed(dense) -> Path:
    compress(dense, dense.parent / "compressed")
    return dense.parent / "compressed"


@pytest.fixture(scope="module")
def unpacked(compressed) -> Path:
    unpack(compressed, compressed.parent / "unpacked")
    return compressed.parent / "unpacked"


# --- the result ---


def test_the_file_takes_the_bits_that_were_asked_for(compressed):
    manifest = CompressionRecord.load(compressed)
    assert bits_in_file(compressed) == pytest.approx(4.0, rel=0.005)
    assert manifest.totals["bits"] == pytest.approx(bits_in_file(compressed), rel=1e-12)


def test_it_computes_what_the_unpacked_weights_compute(compressed, unpacked):
    packed, plain = load(compressed), load(unpacked)
    assert sum(type(module) is PackedLinear for module in packed.modules()) == 14
    assert packed.dtype == plain.dtype == torch.bfloat16
    assert packed.lm_head.embedding is packed.model.embed_tokens
    with reference_path():
        assert torch.equal(logits(packed), logits(plain))


def test_more_bits_come_nearer_to_the_dense_model(dense, tmp_path):
    expected, errors = logits(load(dense)).float(), []
    for bits in ("6", "4"):
        compress(dense, tmp_path / bits, float(bits), head_bits="none")
        found = logits(load(tmp_path / bits)).float()
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[0] < 0.5 * errors[1]
    assert bits_in_file(tmp_path / "6") == pytest.approx(6.0, rel=0.005)


def test_a_finished_folder_holds_no_traces_of_the_run(compressed):
    assert not (compressed / MEASUREMENT).exists()
    assert not list(compressed.glob("*.partial"))
    before = {path.name: path.read_bytes() for path in compressed.iterdir()}
    compress(compressed.parent / "dense", compressed)
    assert {path.name: path.read_bytes() for path in compressed.iterdir()} == before


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_pattern_holds_in_the_result(dense, tmp_path, method):
    compress(dense, tmp_path / "out", pattern="2:4", method=method)
    unpack(tmp_path / "out", tmp_path / "plain")
    found = weights(tmp_path / "plain")
    for name, weight_OI in found.items():
        if name.endswith("_proj.weight"):
            assert holds(weight_OI, 2, 4), name
    assert bits_in_file(tmp_path / "out") == pytest.approx(4.0, rel=0.005)


def test_the_zeros_of_a_mask_stay(dense, tmp_path):
    """Magnitude without dense targets needs no run: its mask follows from the dense weights."""
    compress(dense, tmp_path / "out", sparsity=0.5, method="magnitude", dense_weight=0)
    unpack(tmp_path / "out", tmp_path / "plain")
    before, after = weights(dense), weights(tmp_path / "plain")
    for name, weight_OI in after.items():
        if name.endswith("_proj.weight"):
            keep_OI = reference.keep_above_threshold(before[name].float().abs(), 0.5)
            assert not weight_OI[~keep_OI].any(), name
    assert bits_in_file(tmp_path / "out") == pytest.approx(4.0, rel=0.005)
    totals = CompressionRecord.load(tmp_path / "out").totals
    assert totals["weights"] // 2 <= totals["forced_zeros"] < totals["zeros"], "by the rate"
    assert f"{totals['forced_zeros']:,} of them" in (tmp_path / "out" / "README.md").read_text()


# --- what other commands say of it ---


def test_inspect_shows_zeros_patterns_and_bits(compressed, unpacked):
    found, plain = prunus.inspect(compressed), prunus.inspect(unpacked)
    manifest = CompressionRecord.load(compressed)
    assert (found.blocks, found.left_dense) == (plain.blocks, plain.left_dense)
    assert found.bits == pytest.approx(manifest.totals["bits"])
    assert found.sparsity == plain.sparsity == manifest.totals["sparsity"]
    for left, right in zip(found.linears, plain.linears, strict=True):
        assert (left.name, left.shape, left.zeros) == (right.name, right.shape, right.zeros)
        assert left.patterns == right.patterns
        record = manifest.blocks[left.block].linears[left.name.split(".", 3)[3]]
        assert (left.bits, left.zeros, left.shape) == (record.bits, record.zeros, record.shape)
        assert record.packed["shape"] == list(record.shape)
        assert (left.dtype, right.dtype, right.bits) == ("integers", "bfloat16", None)
    shown = call("inspect", compressed).output
    assert "bits" in shown
    assert "integers" in shown


def test_inspect_names_a_damaged_linear(compressed, tmp_path):
    shutil.copytree(compressed, tmp_path / "damaged")
    shard = tmp_path / "damaged" / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.weight_classes"].fill_(200)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj is damaged"):
        prunus.inspect(tmp_path / "damaged")


@pytest.mark.parametrize("options", [{}, {"head_bits": "none"}, {"sparsity": 0.5}])
def test_plan_predicts_the_size_of_the_result(dense, compressed, tmp_path, options):
    out = compressed
    if options:
        out = tmp_path / "out"
        compress(dense, out, **options)
    recipe = CompressionRecipe(bits=4.0, samples=6, seqlen=16, batch=2, **options)
    planned = describe_plan(
        plan_run(dense, recipe, RunOptions(calibration_data=token_ids()), PackedFormat(recipe))
    )
    stored = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert planned["file_bytes"] == pytest.approx(stored, rel=0.02)
    assert planned["bits"] == 4.0
    parts = CompressionRecord.load(out).size.parts
    assert planned["file"]["parts"].keys() == parts.keys()
    facts = dict(plan_facts(planned).items)
    assert (
        "bits per parameter of the file, 4.000 bits per weight of the linears." in facts["result"]
    )
    assert all(what in facts["parts of it"] for what in parts)


def test_plan_counts_the_measurement(dense):
    options = {"samples": 6, "seqlen": 16, "batch": 2}
    packed = CompressionRecipe(bits=4.0, **options)
    pruned = Recipe(method="sparsegpt", dense_weight=0.25, **options)
    jobs = [
        plan_run(dense, recipe, RunOptions(calibration_data=token_ids()), stored)
        for recipe, stored in ((packed, PackedFormat(packed)), (pruned, PlainTensors()))
    ]
    weights = [dict(plan_facts(describe_plan(job)).items)["weights"] for job in jobs]
    assert "at 4 bits per weight" in weights[0] and "are removed" in weights[1]
    memory = measuring_memory(jobs[0], quantizes=True)
    # Two blocks, six windows of 16 tokens, 64 numbers of the dtype of the computation.
    assert memory.hidden == 2 * 6 * 16 * 64 * jobs[0].dtype.itemsize
    assert describe_plan(jobs[0])["peak_memory_bytes"] > memory.total(hidden=True, paused=False)


def test_a_budget_below_the_measurement_is_refused(dense, monkeypatch):
    recipe = CompressionRecipe(bits=4.0, samples=6, seqlen=16, batch=2)
    needed = BlockMemory(0, 0, 10**14, 0, 10**9)
    monkeypatch.setattr("prunus.engine.linear_job.measuring_memory", lambda job, quantizes: needed)
    with pytest.raises(ValueError, match="measuring how the loss depends on each linear needs"):
        plan_run(dense, recipe, RunOptions(calibration_data=token_ids()), PackedFormat(recipe))


def test_what_takes_the_bytes_of_the_file_is_said(dense, compressed, tmp_path):
    compress(dense, tmp_path / "out", head_bits="none")
    for folder, embeddings in (
        (compressed, "packed embeddings"),
        (tmp_path / "out", "embeddings in bfloat16"),
    ):
        size, tensors = CompressionRecord.load(folder).size, Checkpoint(folder).tensors
        stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert (size.before, size.after) == ((dense / "model.safetensors").stat().st_size, stored)
        assert size.parameters == sum(x.numel() for x in load(dense).parameters())
        assert size.bits_per_parameter == 8 * stored / size.parameters
        # The head is tied to the embeddings.
        assert set(size.parts) == {"packed linears", embeddings, "norms and biases in bfloat16"}
        assert sum(size.parts.values()) == sum(info.nbytes for info in tensors.values())
        nbytes = sum(info.nbytes for name, info in tensors.items() if "embed_tokens" in name)
        assert size.parts[embeddings] == nbytes
        words = " ".join(size.sentences())
        assert f"{nbytes / 1e3:.1f} kB of {embeddings}" in words
        assert words in (folder / "README.md").read_text()
        record = CompressionRecord.load(folder)
        both = " ".join(record.size.sentences(record.all_totals()["bits"]))
        assert both in " ".join(record.table().note.splitlines())
        each = r"[\d.]+ bits per parameter of the file, [\d.]+ bits per weight of the linears\."
        assert re.search(each, both)
    assert both in " ".join(call("report", tmp_path / "out").stdout.split())


def test_the_card_says_bits_and_zeros_and_no_method_that_chose_nothing(dense, compressed, tmp_path):
    card, record = ((compressed / x).read_text() for x in ("README.md", CompressionRecord.FILE))
    totals = CompressionRecord.load(compressed).totals
    assert f"{totals['bits']:.2f} bits per weight" in card and "import prunus" in card
    assert f"{totals['zeros']:,} of {totals['weights']:,} weights" in card
    assert "used like the dense model" not in card and "wanda" not in card + record
    for option in (
        {"method": "alps"},
        {"allocation": "fisher"},
        {"weight_update": "least-squares"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(option))} would say which zeros"):
            compress(dense, tmp_path / "out", **option)
    with pytest.raises(FileExistsError, match=r"another sparsity \(0.0, now 0.5\)"):
        compress(dense, compressed, sparsity=0.5)
    assert CompressionRecipe(bits=3, sparsity=0.5).model_dump()["method"] == "wanda"
    assert CompressionRecipe(bits=3, pattern="2:4").model_dump()["mask_from"] == "wanda"


def test_tables_and_reports_say_bits_and_zeros(compressed, dense, tmp_path):
    manifest = CompressionRecord.load(compressed)
    table = manifest.table()
    total = dict(zip([column.title for column in table.columns], table.total, strict=True))
    assert (total["bits"], total["zeros"]) == (manifest.totals["bits"], manifest.totals["sparsity"])
    assert len(table.rows) == 7
    section = run_section(manifest)
    assert section.title == "dense: 4 bits per weight"
    facts = dict(section.parts[0].items)
    assert (
        facts["bits per weight of the linears"] == f"{manifest.totals['bits']:.3f} (asked for: 4)"
    )
    call("report", compressed, "-o", tmp_path / "page.html")
    assert "bits per weight" in (tmp_path / "page.html").read_text()


# --- families ---


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {"tie_word_embeddings": True}),
        ("gemma2", {}),  # It scales the rows of its embedding.
        ("phi3", {}),
        ("opt", {}),
        ("gpt_neox", {}),
        ("bloom", {}),
        ("mixtral", {}),
        ("qwen3_moe", {"moe_intermediate_size": 64}),
    ],
)
def test_families(family, options, tmp_path):
    folder = tiny_checkpoint(
        tmp_path / "dense", family, torch.bfloat16, **{"num_hidden_layers": 1, **WIDER, **options}
    )
    manifest = compress(folder, tmp_path / "out", 5.0)
    unpack(tmp_path / "out", tmp_path / "plain")
    packed, plain = load(tmp_path / "out"), load(tmp_path / "plain")
    count = sum(isinstance(module, PackedLinear) for module in packed.modules())
    assert count == manifest.totals["linears"] + len(manifest.packed_outside)
    assert isinstance(packed.get_input_embeddings(), PackedEmbedding)
    with reference_path():
        close = (logits(packed) - logits(plain)).float()
    # Experts that the checkpoint stores one by one run one by one when they are packed. Their sum
    # is then rounded in another order.
    tolerance = 0.05 if "experts" in str(manifest.blocks[0].linears) else 0
    assert close.norm() <= tolerance * logits(plain).float().norm()
    # The norms and biases of the dense model are those of the result.
    before, after = weights(folder), weights(tmp_path / "plain")
    assert all(torch.equal(after[name], before[name]) for name in before if before[name].dim() == 1)


def test_experts_in_one_tensor_stay_dense_and_are_named(tmp_path):
    folder = tiny_checkpoint(tmp_path / "dense", "granitemoe", torch.bfloat16)
    manifest = compress(folder, tmp_path / "out", 5.0, ignore=["*.v_proj"])
    names = {f"self_attn.{name}_proj" for name in "qko"}
    assert {name for block in manifest.blocks for name in block.linears} == names
    dense = [name for name in manifest.left_dense if "experts" in name]
    assert len(dense) == 2 * 4 * 3
    before, after = weights(folder), weights(tmp_path / "out")
    assert all(torch.equal(after[n], before[n]) for n in before if "experts" in n)
    found = {linear.name: linear.bits for linear in prunus.inspect(tmp_path / "out").linears}
    assert len(found) == 2 * (4 + 4 * 3)
    assert {n for n, bits in found.items() if bits} == {
        n for n in found if n.endswith(tuple(names))
    }


# --- the same bytes ---


def test_a_resumed_run_spends_the_same_bits_and_gives_the_same_bytes(dense, compressed, tmp_path):
    with pytest.raises(StopError):
        compress(dense, tmp_path / "out", progress=stop_after(1))
    assert (tmp_path / "out" / MEASUREMENT).exists()
    shutil.copytree(tmp_path / "out", tmp_path / "lost")
    (tmp_path / "lost" / MEASUREMENT).unlink()  # it measures again
    manifest = compress(dense, tmp_path / "out", resume=True)
    assert shards(tmp_path / "out") == shards(compressed)
    assert manifest.totals["bits"] == CompressionRecord.load(compressed).totals["bits"]
    compress(dense, tmp_path / "lost")
    assert shards(tmp_path / "lost") == shards(compressed)


def test_replay_gives_the_bytes_of_lockstep(dense, compressed, tmp_path, monkeypatch):
    monkeypatch.setattr(Memory, "fits_lockstep", lambda self, index: False)
    manifest = compress(dense, tmp_path / "out")
    assert {block.walk for block in manifest.blocks} == {"replay"}
    assert shards(tmp_path / "out") == shards(compressed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_killed_at_any_rename_resumes_to_the_same_bytes(tmp_path):
    folder = tiny_checkpoint(tmp_path / "dense", "phi3", torch.bfloat16)  # few linears
    options = {"bits": 4.0, "head_bits": "none"}
    results = run_script("kill_points.py", folder, tmp_path, json.dumps(options), "before")
    assert {len(fnmatch.filter(r["found"], BLOCKS)) for r in results} == {0, 1, 2}
    for result in results:
        assert result["status"] == 0, result
        assert result["equal"], result
        assert not result["left_behind"], result


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0.5}, r"bits must lie in \[1, 8\]"),
        ({"bits": 9}, r"bits must lie in \[1, 8\]"),
        ({"bits": math.nan}, "bits"),
        ({"head_bits": 5}, "head_bits must be 4, 6, 8 or none"),
        ({"reconstruct": "last"}, "reconstruct is not an option here"),
        ({"propagate": "block", "dense_weight": 0}, "propagate is not an option here"),
        ({"head": True}, "head is not an option here"),
        ({"preset": "best"}, "preset is not an option here"),
    ],
)
def test_options_that_do_not_go_with_bits_are_refused(dense, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prunus.compress(
            dense, tmp_path / "out", **{"bits": 3, "calibration": token_ids()} | options
        )
    assert not (tmp_path / "out").exists()


def test_bits_that_cannot_be_reached_are_refused(dense, tmp_path):
    """One plane, and (16 · rows + 24 · columns) bits of each linear: 1.56 bits per weight here."""
    with pytest.raises(ValueError, match=r"bits = 1.5 cannot be reached: .* 1\.5\d bits per"):
        compress(dense, tmp_path / "out", 1.5)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_compressed_are_refused(tmp_path):
    causal = "prunus compress is for causal language models"
    config = AutoConfig.for_model(
        "bert", vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1
    )
    config.num_attention_heads = 4
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "bert")
    images = {"calibration": str(pictures(tmp_path / "images")), "samples": 4}
    vit = save_classifier(tmp_path / "vit", "vit")
    for folder, message, options in (
        (tmp_path / "bert", causal, {}),
        (vit, causal, images),
        (tiny_checkpoint(tmp_path / "gpt2", "gpt2"), "cannot be compressed yet", {}),
        (tiny_checkpoint(tmp_path / "falcon", "falcon"), "cannot be compressed yet", {}),
    ):
        with pytest.raises(NotImplementedError, match=message):
            compress(folder, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="give the folder of a checkpoint"):
        prunus.compress(tiny_model(), "unused", 3, calibration=token_ids())


def test_bits_belong_to_compress_alone(dense, tmp_path):
    with pytest.raises(ValueError, match="use prunus compress"):
        prunus.prune(dense, tmp_path / "out", head_bits=6, calibration=token_ids())
    assert not (tmp_path / "out").exists()


def test_other_bits_in_the_same_folder_are_refused(dense, compressed):
    before = shards(compressed)
    with pytest.raises(FileExistsError, match="another bits"):
        compress(dense, compressed, 3.0)
    assert shards(compressed) == before
