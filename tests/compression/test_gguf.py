"""`prunus compress` to a GGUF file: what is in it, and that it is a whole run like every other."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import prunus
from gguf_cases import dense as dense_weight
from gguf_cases import gguf_checkpoint
from prunus.compression.records import CompressionRecord
from prunus.evaluation.inspection import stored_size
from prunus.evaluation.records import ModelSize
from prunus.model.checkpoint.gguf import import_gguf
from prunus.model.checkpoint.gguf_file import GgufFile
from stopping import StopError, stop_after
from tiny import token_ids


def compress(dense: Path, out: Path, **options) -> CompressionRecord:
    return prunus.compress(dense, out, **{"calibration": token_ids(), "batch": 2, **options})


def imported(path: Path, folder: Path) -> dict[str, torch.Tensor]:
    import_gguf(path, folder, dtype="float32")
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return gguf_checkpoint(tmp_path_factory.mktemp("gguf") / "dense")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_the_file_reads_as_the_weights_that_the_run_computed(family, tmp_path):
    # transformers reads GGUF files of Qwen3 as if all heads had a width of 128.
    width = {"head_dim": 128} if family == "qwen3" else {}
    dense = gguf_checkpoint(tmp_path / "dense", family, **width)
    record = compress(dense, tmp_path / "x.gguf", type="Q3_K")
    found = imported(tmp_path / "x.gguf", tmp_path / "back")
    before = load_file(dense / "model.safetensors")
    assert found.keys() == before.keys()
    for name, weight in before.items():
        kind = record.types.get(name.removesuffix(".weight"))
        error = float((found[name] - weight.float()).norm() / weight.float().norm())
        limit = {None: 1e-6, "Q6_K": 0.02}.get(kind, 0.3)
        assert error < limit, (name, kind, error)
    assert (tmp_path / "x.gguf").stat().st_size == record.size.after
    assert not (tmp_path / "x.gguf.part").exists()
    if family == "gemma3_text":
        return  # its own tokenizer is of another kind
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (dense, tmp_path / "back"))
    assert ours("Hello ab")["input_ids"] == theirs("Hello ab")["input_ids"]


def test_a_killed_run_continues_to_the_same_bytes(dense, tmp_path):
    compress(dense, tmp_path / "whole.gguf", type="Q4_K")
    out = tmp_path / "x.gguf"
    with pytest.raises(StopError):
        compress(dense, out, type="Q4_K", progress=stop_after(1))
    assert not out.exists()
    compress(dense, out, type="Q4_K")
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    # A finished file is found as it is, also if the folder of the run was not removed yet.
    (tmp_path / "x.gguf.part").mkdir()
    assert compress(dense, out, type="Q4_K").state == "finished"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.gguf", "x.gguf"]
    with pytest.raises(FileExistsError, match="another type"):
        compress(dense, out, type="Q3_K")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_gguf_file_in_full_precision_is_compressed_like_its_checkpoint(family, tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense", family)
    compress(dense, tmp_path / "full.gguf", type="Q8_0")
    record = compress(tmp_path / "full.gguf", tmp_path / "x.gguf", type="Q4_K")
    assert record.source == str(tmp_path / "full.gguf")
    compress(dense, tmp_path / "y.gguf", type="Q4_K")
    ours, theirs = (GgufFile.open(tmp_path / name) for name in ("x.gguf", "y.gguf"))
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in ours.tensors:
        first, second = dense_weight(ours, name), dense_weight(theirs, name)
        assert float((first - second).norm() / second.norm()) < 0.2, name


def test_what_cannot_be_written_is_refused_before_any_work(dense, tmp_path):
    narrow = gguf_checkpoint(tmp_path / "narrow", intermediate_size=80)
    (tmp_path / "mine.gguf").write_bytes(b"something else")
    gpt = gguf_checkpoint(tmp_path / "gpt", "gpt_neox")
    before = sorted(tmp_path.iterdir())
    for model, out, options, message in (
        (dense, "x.gguf", {"type": "Q9_K"}, "Q9_K is not a type"),
        (dense, "x.gguf", {"type": "Q4_K", "sparsity": 0.5}, "stores zeros"),
        (dense, "folder", {"type": "Q4_K"}, ".gguf"),
        (dense, "mine.gguf", {"type": "Q4_K"}, "GGUF"),
        (dense, "x.gguf", {"bits": 4}, "needs the `type`"),
        (narrow, "x.gguf", {"type": "Q4_K"}, "80 columns"),
        (gpt, "x.gguf", {"type": "Q4_K"}, "no known layout"),
    ):
        with pytest.raises((ValueError, NotImplementedError), match=message):
            compress(model, tmp_path / out, **options)
        assert sorted(tmp_path.iterdir()) == before


def test_other_verbs_read_the_file(dense, tmp_path):
    out = tmp_path / "x.gguf"
    record = compress(dense, out, type="Q4_K")
    found = prunus.inspect(out)
    assert {linear.dtype for linear in found.linears} == {"Q4_K"}
    assert found.bits == 4.5
    assert "Q4_K" in prunus.report(out)._repr_html_()
    (tmp_path / "text.txt").write_text("A text to score, letter by letter. " * 9)
    import_gguf(out, tmp_path / "back")
    scores = [
        prunus.perplexity(model, str(tmp_path / "text.txt"), seqlen=32).perplexity
        for model in (out, tmp_path / "back")
    ]
    assert scores[0] == scores[1]
    assert stored_size(out) == ModelSize(out.stat().st_size, None)
    assert record.totals["bits"] == 4.5
