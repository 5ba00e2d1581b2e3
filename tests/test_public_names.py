"""The functions that `import prunus` gives: what they return, and that they are imported late."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prunus
from refusals import assert_refused
from report_samples import sweep_results
from tiny import pruned_checkpoint, tiny_checkpoint, token_ids
from tiny_tokenizer import VOCABULARY, byte_tokenizer, dense_checkpoint


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    folder = pruned_checkpoint(tmp_path_factory.mktemp("names") / "pruned", vocab_size=VOCABULARY)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_plan_says_what_each_command_would_do(tmp_path):
    dense = dense_checkpoint(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("some words " * 50)
    options = {"samples": 4, "seqlen": 16, "calibration": str(tmp_path / "text.txt")}
    pruned = prunus.plan(dense, sparsity=0.25, **options)
    assert pruned["to_remove"] == pruned["weights"] // 4
    folder = prunus.plan(dense, tmp_path / "out", bits=8, **options)
    assert folder["file_bytes"] < pruned["file_bytes"] and not (tmp_path / "out").exists()
    smaller = prunus.plan(dense, blocks=1, **options)
    assert (smaller["blocks"], smaller["kept_blocks"]) == (2, 1)
    assert prunus.plan(dense, command="shrink", blocks=1, **options) == smaller | {
        name: pytest.approx(smaller[name], rel=0.2)
        for name in ("least_memory_bytes", "peak_memory_bytes")
    }
    text = {"text": options["calibration"], "seqlen": 16, "held_out": 2}
    trained = prunus.plan(dense, tmp_path / "out", teacher=dense, mode="full", **text)
    assert trained["memory_bytes"] >= trained["disk_bytes"] > pruned["file_bytes"]
    assert prunus.plan(dense, mode="lora", **text)["disk_bytes"] == 0
    assert not (tmp_path / "out").exists()
    for wrong, words in (
        ({"command": "train"}, "must be prune, .* or import"),
        ({"command": "prune", "teacher": dense}, "takes no `teacher`"),
        ({"command": "recover"}, "no record of prunus prune or shrink"),
    ):
        with pytest.raises(ValueError, match=words):
            prunus.plan(dense, **wrong)


def test_importing_the_package_imports_none_of_the_large_libraries():
    code = (
        "import sys, prunus; prunus.__version__; "
        "sys.exit(any(x in sys.modules for x in ('torch', 'transformers', 'rich', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_load_gives_the_model_in_any_dtype_and_its_tokenizer(pruned, tmp_path):
    dense = prunus.load(pruned)
    model, tokenizer = dense
    assert model is dense.model and tokenizer is dense.tokenizer and not model.training
    prunus.compress(pruned, tmp_path / "small", 8, calibration=token_ids())
    small, again = prunus.load(str(tmp_path / "small"))
    assert again("ab")["input_ids"] == tokenizer("ab")["input_ids"]
    ids = tokenizer("some text", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)
    assert small.dtype == torch.bfloat16
    assert prunus.load(pruned, dtype="float32").model.dtype == torch.float32


def test_load_wants_a_tokenizer_before_it_reads_weights(tmp_path, monkeypatch):
    folder = tiny_checkpoint(tmp_path / "bare")
    monkeypatch.setattr("prunus.model.loading.load_model", None)
    assert_refused(ValueError, "no tokenizer", prunus.load, folder)


def test_report_returns_what_it_writes(tmp_path):
    sweep_results().save(tmp_path)
    document = prunus.report([tmp_path], tmp_path / "page.html", title="Mine")
    assert document.title == "Mine" and "Mine" in (tmp_path / "page.html").read_text()
    assert prunus.report(tmp_path).sections[0].parts == document.sections[0].parts
    with pytest.raises(ValueError, match=r"must end in \.html, .* or \.pdf"):
        prunus.report(tmp_path / "not read", tmp_path / "page.txt")
    assert_refused(ValueError, "give the folder", prunus.report, [])
