"""`prunus compress` is a whole run like every other, whatever the format of its result."""

import fnmatch
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import prunus
from command_line import call
from pictures import pictures, save_classifier
from prunus.compression.compress import Compression
from prunus.engine.block_memory import BlockMemory, Memory
from prunus.engine.result import MEASUREMENT
from prunus.engine.run_options import RunOptions
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.checkpoint.tensor_files import Checkpoint
from prunus.model.loading import load_model
from prunus.model.open_folder import OpenFolder
from prunus.pruning.manifest import Manifest
from prunus.pruning.prune import Pruning
from prunus.pruning.recipe import Recipe
from prunus.reporting.run_sections import run_section
from prunus.reporting.tables import plan_facts
from prunus.rounding.compression_recipe import CompressionRecipe
from prunus.rounding.compression_record import CompressionRecord
from prunus.rounding.loss_sensitivity import measuring_memory
from refusals import assert_refused
from scripts import run_script
from stopping import assert_all_resumed, interrupt
from tiny import shards, tiny_checkpoint, tiny_model, token_ids, weights

WIDER = {"hidden_size": 64, "intermediate_size": 128}
IDS = token_ids(2, 12)
BLOCKS = "model-0000[12]-of-00003.safetensors"


def compress(dense: Path, out: Path, bits: float = 4.0, **options) -> Manifest:
    return prunus.compress(dense, out, bits, **{"calibration": token_ids(), "batch": 2, **options})


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(open_folder(folder))(IDS).logits.float()


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compress") / "dense"
    return tiny_checkpoint(folder, "llama", torch.bfloat16, tie_word_embeddings=True, **WIDER)


@pytest.fixture(scope="module")
def compressed(dense) -> Path:
    compress(dense, dense.parent / "compressed")
    return dense.parent / "compressed"


# --- the result ---


def test_a_finished_folder_stays_as_it_is(compressed):
    assert not list(compressed.glob("*.partial"))
    before = {path.name: path.read_bytes() for path in compressed.iterdir()}
    compress(compressed.parent / "dense", compressed)
    assert {path.name: path.read_bytes() for path in compressed.iterdir()} == before


# --- what other commands say of it ---


def test_plan_counts_the_measurement(dense):
    options = {"samples": 6, "seqlen": 16, "batch": 2}
    small = CompressionRecipe(bits=4.0, format="mlx", **options)
    pruned = Recipe(method="sparsegpt", dense_weight=0.25, **options)
    plans = [
        command(dense, None, recipe, RunOptions(calibration_data=token_ids())).plan()
        for recipe, command in ((small, Compression), (pruned, Pruning))
    ]
    facts = [dict(plan_facts(plan.describe()).items) for plan in plans]
    assert "removed" not in facts[0]["weights"] and "are removed" in facts[1]["weights"]
    assert "sparsity" not in facts[0] and facts[1]["sparsity"] == "the same everywhere"
    memory = measuring_memory(plans[0], feedback=True)
    # Two blocks, six windows of 16 tokens, 64 numbers of the dtype of the computation.
    assert memory.hidden == 2 * 6 * 16 * 64 * plans[0].dtype.itemsize
    assert plans[0].describe()["peak_memory_bytes"] > memory.total(hidden=True, paused=False)


def test_a_budget_below_the_measurement_is_refused(dense, monkeypatch):
    recipe = CompressionRecipe(bits=4.0, samples=6, seqlen=16, batch=2, format="mlx")
    needed = BlockMemory(0, 0, 10**14, 0, 10**9)
    monkeypatch.setattr(
        "prunus.rounding.loss_sensitivity.measuring_memory", lambda plan, feedback: needed
    )
    command = Compression(dense, None, recipe, RunOptions(calibration_data=token_ids()))
    assert_refused(ValueError, "measuring how the loss depends on each linear needs", command.plan)


def test_what_takes_the_bytes_of_the_file_is_said(dense, compressed):
    record, tensors = CompressionRecord.load(compressed), Checkpoint(compressed).tensors
    size, stored = record.size, sum(map(len, shards(compressed).values()))
    assert (size.before, size.after) == ((dense / "model.safetensors").stat().st_size, stored)
    dense_model = AutoModelForCausalLM.from_pretrained(dense)
    assert size.parameters == sum(x.numel() for x in dense_model.parameters())
    assert size.bits_per_parameter == 8 * stored / size.parameters
    # The head is tied to the embeddings.
    embeddings = "embeddings in bfloat16"
    assert set(size.parts) == {"rounded linears", embeddings, "norms and biases in bfloat16"}
    assert sum(size.parts.values()) == sum(info.nbytes for info in tensors.values())
    nbytes = sum(info.nbytes for name, info in tensors.items() if "embed_tokens" in name)
    assert size.parts[embeddings] == nbytes
    words = " ".join(size.sentences())
    assert f"{nbytes / 1e3:.1f} kB of {embeddings}" in words
    assert words in (compressed / "README.md").read_text()
    both = " ".join(size.sentences(record.all_totals()["bits"]))
    assert both in " ".join(record.table().note.splitlines())
    each = r"[\d.]+ bits per parameter with embeddings and head, [\d.]+ bits per weight of the lin"
    assert re.search(each, both)
    assert both in " ".join(call("report", compressed).stdout.split())


def test_tables_and_reports_say_bits_and_zeros(compressed, dense, tmp_path):
    manifest = CompressionRecord.load(compressed)
    table = manifest.table()
    total = dict(zip([column.title for column in table.columns], table.total, strict=True))
    assert (total["bits"], total["zeros"]) == (manifest.totals["bits"], manifest.totals["sparsity"])
    assert len(table.rows) == 7
    section = run_section(manifest)
    assert section.title == "dense: 4 bits per weight"
    facts = dict(section.parts[0].items)
    assert facts["bits per weight of the linears"] == "4.250 (asked for: 4)"
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
    compress(folder, tmp_path / "out", 8)
    expected = logits(folder)
    assert float((logits(tmp_path / "out") - expected).norm() / expected.norm()) < 0.05
    # The norms and biases of the dense model are those of the result.
    before, after = weights(folder), load_model(OpenFolder(tmp_path / "out")).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if before[name].dim() == 1)


def test_experts_in_one_tensor_stay_dense_and_are_named(tmp_path):
    folder = tiny_checkpoint(tmp_path / "dense", "granitemoe", torch.bfloat16)
    manifest = compress(folder, tmp_path / "out", 8, ignore=["*.v_proj"])
    names = {f"self_attn.{name}_proj" for name in "qko"}
    assert {name for block in manifest.blocks for name in block.linears} == names
    dense = [name for name in manifest.left_dense if "experts" in name]
    assert len(dense) == 2 * 4 * 3
    before, after = weights(folder), load_model(OpenFolder(tmp_path / "out")).state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before if "experts" in n)
    found = {linear.name: linear.bits for linear in prunus.inspect(tmp_path / "out").linears}
    assert len(found) == 2 * (4 + 4 * 3)
    assert {n for n, bits in found.items() if bits} == {
        n for n in found if n.endswith(tuple(names))
    }


# --- the same bytes ---


def test_a_resumed_run_takes_the_measurement_or_makes_it_again(dense, tmp_path):
    compress(dense, tmp_path / "whole", format="mlx")
    assert not (tmp_path / "whole" / MEASUREMENT).exists()
    interrupt(compress, dense, tmp_path / "out", format="mlx")
    assert (tmp_path / "out" / MEASUREMENT).exists()
    shutil.copytree(tmp_path / "out", tmp_path / "lost")
    (tmp_path / "lost" / MEASUREMENT).unlink()  # it measures again
    for name in ("out", "lost"):
        compress(dense, tmp_path / name, format="mlx", resume=True)
        assert shards(tmp_path / name) == shards(tmp_path / "whole")
        configs = [(tmp_path / each / "config.json").read_text() for each in (name, "whole")]
        assert configs[0] == configs[1]


def test_replay_gives_the_bytes_of_lockstep(dense, compressed, tmp_path, monkeypatch):
    monkeypatch.setattr(Memory, "fits_lockstep", lambda self, index: False)
    manifest = compress(dense, tmp_path / "out")
    assert {block.walk for block in manifest.blocks} == {"replay"}
    assert shards(tmp_path / "out") == shards(compressed)


def test_weights_learn_before_they_are_rounded(dense, tmp_path, monkeypatch):
    options = {"bits": 3.0, "reconstruct": "all", "calibration": token_ids(64)}
    learnt = compress(dense, tmp_path / "learnt", **options)
    trained = [block.reconstruction for block in learnt.blocks]
    assert all(x.error_after < x.error_before and x.measure == "outputs" for x in trained)
    compress(dense, tmp_path / "plain", **options | {"reconstruct": "none"})
    folders = (open_folder(tmp_path / name) for name in ("learnt", "plain"))
    after, before = (load_model(folder).state_dict() for folder in folders)
    # What follows attention learns; the output of attention sees more windows of the dense model.
    first = [key for key in before if "layers.0" in key]
    changed = {key.split(".")[-2] for key in first if not torch.equal(after[key], before[key])}
    assert changed - {"o_proj"} == {"gate_proj", "up_proj", "down_proj"}
    monkeypatch.setattr(Memory, "fits_lockstep", lambda self, index: False)
    again = compress(dense, tmp_path / "replay", **options)
    assert {block.walk for block in again.blocks} == {"replay"}
    assert shards(tmp_path / "replay") == shards(tmp_path / "learnt")


@pytest.mark.parametrize("walk", ["lockstep", "replay"])
def test_nothing_learns_where_no_part_of_the_block_can_run_alone(walk, tmp_path, monkeypatch):
    """Gemma 3 has a norm after the MLP, and loses more if the whole block learns."""
    monkeypatch.setattr(Memory, "fits_lockstep", lambda self, index: walk == "lockstep")
    dense = tiny_checkpoint(tmp_path / "dense", "gemma2", torch.bfloat16, **WIDER)
    record = compress(dense, tmp_path / "out", reconstruct="all")
    assert [(b.walk, b.reconstruction) for b in record.blocks] == [(walk, None)] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_killed_at_any_rename_resumes_to_the_same_bytes(tmp_path):
    folder = tiny_checkpoint(tmp_path / "dense", "phi3", torch.bfloat16)  # few linears
    options = {"bits": 4.0, "reconstruct": "all"}
    results = run_script("kill_points.py", folder, tmp_path, json.dumps(options), "before")
    assert {len(fnmatch.filter(r["found"], BLOCKS)) for r in results} == {0, 1, 2}
    assert_all_resumed(results)


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits must be from 1 to 9, such as 4 or 4.5; got 0$"),
        ({"bits": 9.5}, "bits must be from 1 to 9"),
        ({"bits": math.nan}, "bits"),
        ({"bits": 4, "size": "1MB"}, "give either `bits`"),
        ({"bits": None}, "give either `bits`"),
        ({"head_bits": 5}, "head_bits must be 4, 6, 8 or none"),
        ({"reconstruct": "last"}, "reconstruct: input should be 'none' or 'all'"),
        ({"reconstruct": "all", "rounding": "nearest"}, "reconstruct would change the feedback"),
        ({"propagate": "block", "dense_weight": 0}, "propagate is not an option here"),
        ({"head": True}, "head is not an option here"),
        ({"pattern": "2:4"}, "no file of compress gets smaller by zeros; use prunus prune"),
        ({"method": "alps"}, "method is not an option here"),
    ],
)
def test_options_that_do_not_go_with_bits_are_refused(dense, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prunus.compress(
            dense, tmp_path / "out", **{"bits": 4, "calibration": token_ids()} | options
        )
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
        assert_refused(NotImplementedError, message, compress, folder, tmp_path / "out", **options)
    loaded = tiny_model()
    for output in ("unused", "unused.gguf"):
        with pytest.raises(ValueError, match="give the folder of a checkpoint"):
            prunus.compress(loaded, output, 4, calibration=token_ids())
        with pytest.raises(ValueError, match="give the folder of a checkpoint"):
            prunus.plan(loaded, output, command="compress", bits=4)


def test_other_bits_and_other_formats_in_the_same_folder_are_refused(dense, compressed):
    for options, message in (({"bits": 8}, "another bits"), ({"format": "mlx"}, "another format")):
        assert_refused(FileExistsError, message, compress, dense, compressed, **options)
