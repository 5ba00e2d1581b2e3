"""Whole blocks, channels and heads at the same sizes: benchmarks/structure.py and flap.py."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from places import import_benchmark
from prunus.structure import blocks
from prunus.structure.record import StructureRecord
from tiny import tiny_checkpoint, tiny_model, token_ids

flap = import_benchmark("flap")
structure = import_benchmark("structure")


@pytest.fixture
def given(tmp_path):
    """Arguments of a small comparison of a model with 4 blocks."""
    tiny_checkpoint(tmp_path / "dense", num_hidden_layers=4)
    save_file({"input_ids": token_ids(6, 16)}, tmp_path / "ids.safetensors")
    options = {"--calibration": tmp_path / "ids.safetensors", "--samples": 6, "--seqlen": 16}
    options |= {"--texts": tmp_path / "ids.safetensors", "--limit": 3, "--eval-seqlen": 8}
    fixed = [str(part) for option in options.items() for part in option]
    return [str(tmp_path / "dense"), str(tmp_path / "work"), *fixed]


def rows_of(tmp_path):
    return json.loads((tmp_path / "work" / "structure.json").read_text())["rows"]


def test_a_row_is_made_once_and_goes_on_with_the_search_of_others(
    given, tmp_path, capsys, monkeypatch
):
    structure.main([*given, "--sizes", "0.8", "--ways", "blocks", "flap"])
    shrink, made, searched = structure.shrink_by_recipe, [], []
    step = blocks.candidate_states
    monkeypatch.setattr(
        blocks, "candidate_states", lambda *args: searched.append(made[-1]) or step(*args)
    )
    monkeypatch.setattr(
        structure,
        "shrink_by_recipe",
        lambda model, folder, *given, **options: (
            made.append(folder.name) or shrink(model, folder, *given, **options)
        ),
    )
    structure.main([*given, "--sizes", "0.8", "0.5", "--ways", "blocks", "blocks+repair", "flap"])
    assert made == ["0.8-blocks+repair", "0.5-blocks", "0.5-blocks+repair"]
    # Once for the dense model, and once for the second block.
    assert searched == ["0.5-blocks"] * 2
    rows = rows_of(tmp_path)
    shares = {key: round(row["share"], 1) for key, row in rows.items()}
    assert shares == {
        "0.8 blocks": 0.8,  # 0.75
        "0.8 flap": 0.8,
        "0.8 blocks+repair": 0.8,
        "0.5 blocks": 0.5,
        "0.5 blocks+repair": 0.5,
        "0.5 flap": 0.5,
    }
    for size in ("0.8", "0.5"):
        first, second = (
            StructureRecord.load(tmp_path / "work" / f"{size}-blocks{part}")
            for part in ("", "+repair")
        )
        assert first.search == second.search
        assert not any(block.repair for block in first.blocks)
        assert any(block.repair for block in second.blocks)
        assert rows[f"{size} blocks+repair"]["seconds"] > rows[f"{size} blocks"]["seconds"]
        assert all(score["kl"] > 0 for score in rows[f"{size} blocks"]["scores"].values())
    assert "| blocks+repair | 50.0 % |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was measured with scored = '3 windows of 8 tokens'"):
        structure.main([*given, "--limit", "2"])


def test_width_is_the_largest_that_is_not_above_a_size(given, tmp_path):
    structure.main([*given, "--sizes", "0.7", "--ways", "wanda-sp"])
    row = rows_of(tmp_path)["0.7 wanda-sp"]
    # Left are 34 of 64 channels, all heads and the norms. With 2 of 4 query heads 44 channels would
    # be left, which is less.
    assert row["share"] == pytest.approx((34 * 96 + 2 * 32 * 32 + 2 * 16 * 32 + 64) / 9280)
    with pytest.raises(ValueError, match=r"cannot come to 0\.2 by width alone"):
        structure.main([*given, "--sizes", "0.2", "--ways", "wanda-sp"])


def test_speed_is_a_ratio_to_the_dense_model_in_the_same_turn(given, tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    structure.main([*given, "--sizes", "0.5", "--ways", "shortgpt", "flap"])
    measured = []

    def bench(folders, **_options):
        measured.append(folders[0].rpartition("/")[2])
        return [SimpleNamespace(decode_tokens_per_second=(0, float(len(measured)), 0))]

    monkeypatch.setattr(structure, "bench", bench)
    structure.main([*given, "--speed", "--rounds", "1"])
    structure.main([*given, "--speed", "--rounds", "2"])
    assert measured == ["dense", "0.5-shortgpt"] * 2
    rows = rows_of(tmp_path)
    ratios = [each["ratio"]["transformers"] for each in rows["0.5 shortgpt"]["speeds"]]
    assert ratios == [2 / 1, 4 / 3]
    assert "speeds" not in rows["0.5 flap"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without biases, and with
def test_flap_removes_what_a_naive_reference_removes(family):
    model, ids, size = tiny_model(family), token_ids(), 0.45
    # 2 key-value heads of 16 columns each, and 64 channels.
    seen, readers = {}, ("self_attn.o_proj", "mlp.down_proj")
    linears = {
        f"{index}.{name}": layer.get_submodule(name)
        for index, layer in enumerate(model.model.layers)
        for name in readers
    }
    handles = [
        linear.register_forward_pre_hook(
            lambda _linear, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1))
        )
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    units = []
    for name, linear in linears.items():
        scores = [
            float(seen[name][:, j].var() * weights[name][:, j].square().sum())
            for j in range(linear.in_features)
        ]
        scores = torch.tensor([x**2 if "o_proj" in name else x for x in scores])
        scores = ((scores - scores.mean()) / scores.std()).tolist()
        width = 16 if "o_proj" in name else 1
        for unit in range(linear.in_features // width):
            columns = list(range(unit * width, (unit + 1) * width))
            units.append((sum(scores[j] for j in columns) / width, name, columns))
    has_bias = family == "qwen2"  # on q, k and v
    cost = {16: 16 * 32 * 2 + 8 * 32 * 2 + has_bias * (16 + 8 + 8), 1: 3 * 32}
    whole = sum(p.numel() for p in model.model.layers.parameters())
    left, gone = whole, {}
    for _, name, columns in sorted(units):
        step = left - cost[len(columns)] + (0 if name in gone else 32)
        if abs(step / whole - size) > abs(left / whole - size):
            break
        left = step
        gone.setdefault(name, []).extend(columns)
    assert any("o_proj" in name for name in gone), "a head goes in this example"

    assert flap.flap(model, ids, size) == pytest.approx(left / whole)
    for name, linear in linears.items():
        lost = gone.get(name, [])
        assert sorted(lost) == (linear.weight == 0).all(0).nonzero().flatten().tolist()
        if lost:
            mean = seen[name][:, lost].mean(0)
            torch.testing.assert_close(linear.bias.detach(), weights[name][:, lost] @ mean)
        else:
            assert linear.bias is None
        weights[name][:, lost] = 0
        assert torch.equal(linear.weight, weights[name])
