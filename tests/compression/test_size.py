"""`prunus compress --size`: the files have the size asked for, or nothing is written."""

import re

import pytest
import torch
from prunus.compression.rate_control import RateControl
from prunus.formats.packed.format import PackedFormat

import prunus
from command_line import call
from prunus.engine.linear_job import plan_run
from prunus.engine.options import RunOptions
from prunus.formats.recipe import CompressionRecipe
from stopping import StopError, stop_after
from tiny import shards, tiny_checkpoint, token_ids

WIDER = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_checkpoint(
        tmp_path_factory.mktemp("size") / "dense", "llama", torch.bfloat16, **WIDER
    )


def compress(dense, out, size, **options):
    return prunus.compress(dense, out, size=size, calibration=token_ids(), batch=2, **options)


def in_files(folder) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("size", "options"),
    [("50KB", {}), ("50KiB", {"head_bits": "none"}), (45_000, {"sparsity": 0.5}), ("smallest", {})],
)
def test_the_files_take_the_size_and_never_more(dense, tmp_path, size, options):
    if size == "smallest":
        with pytest.raises(ValueError, match="is not possible") as refused:
            compress(dense, tmp_path / "out", 1, **options)
        size = int(re.search(r"\(([\d,]+) to", str(refused.value))[1].replace(",", ""))
    recipe = CompressionRecipe(size=size, samples=6, seqlen=16, batch=2, **options)
    job = plan_run(dense, recipe, RunOptions(calibration_data=token_ids()), PackedFormat(recipe))
    record = compress(dense, tmp_path / "out", size, **options)
    assert 0.995 * recipe.size <= in_files(tmp_path / "out") == record.size.after <= recipe.size
    assert job.format.file_bytes() == pytest.approx(recipe.size, rel=0.005)
    assert job.format.bits == pytest.approx(record.totals["bits"], rel=0.01)


def test_a_linear_that_would_exceed_the_size_is_rounded_again(dense, tmp_path, monkeypatch):
    """The last linear gets half a bit too much at first."""
    steps, begin = [], RateControl.begin

    def finer(self, name, statistics, coarser=0.0):
        steps.append((name, coarser))
        return begin(self, name, statistics, coarser - 0.5 * (len(self._waiting) == 1))

    monkeypatch.setattr(RateControl, "begin", finer)
    compress(dense, tmp_path / "out", 50_000)
    last = [coarser for name, coarser in steps if name == steps[-1][0]]
    assert len(last) > 1 and last == sorted(last) and last[0] == 0
    assert 0.99 * 50_000 < in_files(tmp_path / "out") <= 50_000


def test_a_resumed_run_reaches_the_same_bytes(dense, tmp_path):
    compress(dense, tmp_path / "whole", 50_000)
    with pytest.raises(StopError):
        compress(dense, tmp_path / "out", 50_000, progress=stop_after(1))
    compress(dense, tmp_path / "out", 50_000, resume=True)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    with pytest.raises(FileExistsError, match="another size"):
        compress(dense, tmp_path / "out", 60_000)


def test_impossible_sizes_are_refused_with_those_that_are_possible(dense, tmp_path):
    for size in ("20kB", "1GB"):
        with pytest.raises(ValueError, match=r"takes [\d.]+ kB to [\d.]+ kB .*`head_bits`"):
            compress(dense, tmp_path / "out", size)
    for options in ({}, {"bits": 3, "size": "1MB"}):
        with pytest.raises(ValueError, match="give either `bits`"):
            prunus.compress(dense, tmp_path / "out", **options)
    refused = call("compress", dense, tmp_path / "out", "--size", "big", status=2)
    assert "looks like 8GB" in refused.output
    assert not (tmp_path / "out").exists()
