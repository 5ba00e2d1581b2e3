"""Noise within the quantisation step: benchmarks/dither.py."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from places import import_benchmark

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import gguf

from tiny_gguf import tiny_llama, write_gguf

dithering = import_benchmark("dither")
Kind = gguf.GGMLQuantizationType


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int = 3) -> np.ndarray:
    """Rows of two blocks of random bytes, whose float16 scales are finite."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = np.random.default_rng(0).integers(0, 256, (rows * 2, size), dtype=np.uint8)
    integers = np.zeros(size, dtype=bool)
    for first, stop, _ in dithering.KINDS[kind]:
        integers[first:stop] = True
    # Of the other bytes, the float16 scales are the first 2 or 4, or at Q6_K the last 2.
    scales = [size - 2] if kind == Kind.Q6_K else range(0, 4 if kind in FOUR else 2, 2)
    for at in scales:
        assert not integers[at : at + 2].any()
        blocks[:, at : at + 2] = np.linspace(0.01, 0.1, len(blocks), dtype="<f2")[:, None].view(
            np.uint8
        )
    return blocks.reshape(rows, -1)


FOUR = (Kind.Q4_1, Kind.Q4_K)  # with two float16 numbers, a scale and an offset


@pytest.mark.parametrize("kind", dithering.KINDS, ids=lambda kind: kind.name)
def test_levels_are_whole_steps_apart(kind):
    data = random_blocks(kind)
    steps = dithering.quantisation_steps(data, kind)
    values = gguf.quants.dequantize(data, kind)
    assert steps.shape == values.shape
    assert (steps >= 0).all()
    # Every kind has sub-blocks of at least 16 weights with one step.
    values, steps = values.reshape(-1, 16), steps.reshape(-1, 16)
    assert np.allclose(steps, steps[:, :1], rtol=1e-4)
    known = steps[:, 0] > 0
    assert known.mean() > 0.9
    distances = (values - values[:, :1])[known] / steps[known, :1]
    assert np.abs(distances - distances.round()).max() < 0.01
    # Random integers have no common divisor, so the step is no fraction of the true one.
    assert np.gcd.reduce(distances.round().astype(int).ravel()) == 1


def test_the_noise_is_within_half_a_step(tmp_path):
    source = tmp_path / "tiny.gguf"
    before = write_gguf(tiny_llama(), source, "Q4_1")
    summary = dithering.dither(source, tmp_path / "noisy", seed=3)
    after = load_file(tmp_path / "noisy" / "model.safetensors")
    dithering.dither(source, tmp_path / "again", seed=3)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert after.keys() == before.keys()
    noisy = 0
    for name, values in before.items():
        assert torch.equal(after[name], again[name]), "the same seed gives the same noise"
        if values.dim() == 1:
            assert torch.equal(after[name], values.to(torch.bfloat16))
            continue
        noisy += values.numel()
        # A block of 32 has 16 levels between its extremes.
        blocks = values.reshape(-1, 32)
        steps = (blocks.amax(dim=1) - blocks.amin(dim=1)) / 15
        change = (after[name].float() - values).reshape(-1, 32) / steps[:, None]
        rounding = blocks.abs() / 256 / steps[:, None]
        assert (change.abs() <= 0.501 + rounding).all()
        assert 0.26 < change.std() < 0.32, "uniform noise has a deviation of 1/sqrt(12)"
    assert summary["dithered"] == noisy


def test_the_gguf_file_holds_the_same_numbers(tmp_path):
    source = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama(), source, "Q8_0")
    dithering.dither(source, tmp_path / "noisy")
    stored = load_file(tmp_path / "noisy" / "model.safetensors")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "noisy.gguf").tensors}
    for ours, theirs in (
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ):
        tensor = tensors[theirs]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(torch.from_numpy(values.copy()), stored[ours].float())
    assert {t.tensor_type for t in tensors.values() if len(t.shape) > 1} == {Kind.BF16}


def test_nothing_is_overwritten_and_unknown_kinds_are_refused(tmp_path, monkeypatch, capsys):
    source = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama(), source, "Q5_0")
    with pytest.raises(ValueError, match=r"is of kind Q5_0; give a file whose quantised tensors"):
        dithering.dither(source, tmp_path / "noisy")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
    (tmp_path / "noisy.gguf").write_bytes(b"mine")
    monkeypatch.setattr(sys, "argv", ["dither.py", str(source), str(tmp_path / "noisy")])
    with pytest.raises(SystemExit, match="is there already; give --overwrite"):
        dithering.main()
    assert (tmp_path / "noisy.gguf").read_bytes() == b"mine"
