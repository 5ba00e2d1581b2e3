"""The presets as a whole: allocation, dense targets, and block reconstruction."""

import pytest
import torch

import prunus
from prunus.engine.block import dense_stream
from prunus.engine.memory import Memory
from prunus.engine.reconstruction import reconstruct_block
from stopping import StopError, stop_after
from tiny import shards, tiny_checkpoint, token_ids


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Give the short windows of these tests several training steps each."""
    monkeypatch.setattr(reconstruct_block, "_TOKENS_PER_STEP", 8)


def check_same_bytes_resumed_and_replayed(dense, tmp_path, monkeypatch, options):
    """A run that was resumed, and one that replays blocks, must equal the run `plain`."""
    with pytest.raises(StopError):
        prunus.prune(dense, tmp_path / "resumed", **options, progress=stop_after(1))
    prunus.prune(dense, tmp_path / "resumed", **options)
    monkeypatch.setattr(Memory, "fits_lockstep", lambda self, index: False)
    prunus.prune(dense, tmp_path / "replayed", **options)
    expected = shards(tmp_path / "plain")
    assert shards(tmp_path / "resumed") == expected
    assert shards(tmp_path / "replayed") == expected


@pytest.mark.parametrize(("family", "pattern"), [("mixtral", "unstructured"), ("gpt_neox", "2:4")])
def test_best_gives_the_same_bytes_in_memory_replayed_and_resumed(
    family, pattern, tmp_path, monkeypatch
):
    dense = tiny_checkpoint(tmp_path / "dense", family, torch.bfloat16)
    options = {"preset": "best", "pattern": pattern, "calibration": token_ids(8, 32), "batch": 1}
    report = prunus.prune(dense, tmp_path / "plain", **options)
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=0.01)
    # One of eight windows is held out. Where attention and MLP are added in one operation, as in
    # gpt_neox, the part after attention cannot run alone, and the whole block is trained.
    *earlier, last = [block.reconstruction.steps for block in report.blocks]
    assert set(earlier) == {3 * 7 if family == "gpt_neox" else 5 * 7}
    assert last == (3 * 7 if family == "gpt_neox" else 8 * 7), "by logits"
    shares = {
        linear.zeros / (linear.shape[0] * linear.shape[1])
        for b in report.blocks
        for linear in b.linears.values()
    }
    assert (max(shares) > min(shares) + 0.01) == (pattern == "unstructured")
    check_same_bytes_resumed_and_replayed(dense, tmp_path, monkeypatch, options)


@pytest.mark.parametrize(("family", "pattern"), [("llama", "unstructured"), ("gpt_neox", "2:4")])
def test_balanced_reconstructs_the_last_block_alone_on_the_windows_of_the_dense_stream(
    family, pattern, tmp_path, monkeypatch
):
    monkeypatch.setattr(dense_stream, "_TOKENS_PER_FEATURE", 0.5)
    dense = tiny_checkpoint(tmp_path / "dense", family, torch.bfloat16)
    options = {
        "preset": "balanced",
        "pattern": pattern,
        "calibration": token_ids(16, 32),
        "batch": 1,
    }
    report = prunus.prune(dense, tmp_path / "plain", **options)
    *earlier, last = [block.reconstruction for block in report.blocks]
    assert earlier and not any(earlier)
    # Every fourth of sixteen windows runs through the dense model; one of these is held out.
    assert last.steps == (3 if family == "gpt_neox" else 8) * 3
    assert last.measure == "logits" and last.error_after <= last.error_before
    without = prunus.prune(dense, tmp_path / "without", **options, reconstruct="none")
    assert not any(block.reconstruction for block in without.blocks)
    for mine, others in zip(report.blocks[:-1], without.blocks, strict=False):
        errors = [
            [linear.relative_output_error for linear in b.linears.values()] for b in (mine, others)
        ]
        assert errors[0] == errors[1], "no earlier block changes"
    check_same_bytes_resumed_and_replayed(dense, tmp_path, monkeypatch, options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_runs_with_16_bits_train_on_processors_without_bfloat16(dtype, tmp_path, monkeypatch):
    """A LayerNorm returns the dtype of its input, which float32 weights would refuse."""
    monkeypatch.setattr("prunus.engine.linear_job.native_bfloat16", lambda: False)
    options = {"calibration": token_ids(), "dtype": dtype, "reconstruct": "all", "batch": 1}
    dense = tiny_checkpoint(tmp_path / "dense", "gpt_neo", torch.float16)
    for block in prunus.prune(dense, tmp_path / "out", **options).blocks:
        assert block.reconstruction.error_after < block.reconstruction.error_before
