"""Masks of a whole model: as bits in a file, and as what prune removes."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import prunus
from command_line import call
from prunus.pruning.masks import Masks
from refusals import assert_refused
from tiny import shards, tiny_checkpoint, tiny_model, token_ids, tree, weights

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def wanda(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("masks")
    dense, folder = tiny_checkpoint(scratch / "dense"), scratch / "wanda"
    prunus.prune(dense, folder, sparsity=0.5, calibration=token_ids(), ignore=["*.1.mlp.*"])
    return folder


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**30))
def test_masks_are_the_same_after_they_are_packed(rows, columns, seed):
    zero_OI = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    masks = Masks.pack({"a": zero_OI, "b": ~zero_OI})
    assert torch.equal(masks["a"], zero_OI) and torch.equal(masks["b"], ~zero_OI)
    assert masks.sparsity(masks) == 0.5
    assert masks.packed_OB["a"].shape == (rows, -(-columns // 8))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_masks_of_a_pruned_folder_are_its_zeros_and_prune_to_the_same_bytes(family, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family, torch.bfloat16)
    prunus.prune(dense, tmp_path / "wanda", sparsity=0.5, calibration=token_ids())
    found = prunus.masks(tmp_path / "wanda", tmp_path / "masks.safetensors")
    linears = prunus.inspect(tmp_path / "wanda").linears
    assert [*found] == [linear.name for linear in linears]
    for linear in linears:
        assert found[linear.name].shape == linear.shape
        assert int(found[linear.name].sum()) == linear.zeros
    expected = weights(tmp_path / "wanda")
    ways = (tmp_path / "masks.safetensors", tmp_path / "wanda", dict(found), found)
    for number, given_masks in enumerate(ways):
        out = tmp_path / f"again{number}"
        record = prunus.prune(dense, out, masks=given_masks)
        assert record.recipe.method == "mask"
        assert record.inputs.masks_sha256 == found.sha256
        again = weights(out)
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    "options", [{"weight_update": "least-squares"}, {"method": "obs"}], ids=str
)
def test_the_other_weights_are_corrected_if_asked_for(wanda, tmp_path, options):
    dense = wanda.parent / "dense"
    masks = prunus.masks(wanda)
    shared = {"calibration": token_ids(), **options}
    found = prunus.prune(dense, tmp_path / "out", masks=wanda, **shared)
    kept = prunus.prune(dense, tmp_path / "kept", masks=masks, calibration=token_ids())
    assert found.totals["zeros"] == kept.totals["zeros"]
    comparison = prunus.inspect(tmp_path / "out", masks).compared["all"]
    assert comparison["equal"] == comparison["intersection_over_union"] == 1
    before, after = weights(tmp_path / "kept"), weights(tmp_path / "out")
    assert not torch.equal(before[f"{Q}.weight"], after[f"{Q}.weight"])
    # The mask is that of Wanda, so the result is what the same update after Wanda gives.
    chosen = {"method": "wanda", **options, "sparsity": 0.5, "propagate": "block"}
    shared |= {"propagate": "block", "batch": 1}
    whole = prunus.prune(dense, tmp_path / "whole", **shared | chosen)
    again = prunus.prune(dense, tmp_path / "again", masks=tmp_path / "whole", **shared)
    assert whole.sha256 == again.sha256


def test_linears_without_a_mask_stay_dense(wanda, tmp_path):
    dense = wanda.parent / "dense"
    record = prunus.prune(dense, tmp_path / "out", masks={Q: prunus.masks(wanda)[Q]})
    assert f"{Q}.weight" not in record.left_dense and len(record.left_dense) == 13
    before, after = weights(dense), weights(tmp_path / "out")
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        f"{Q}.weight"
    ]


def test_an_unfinished_run_goes_on_with_the_same_masks_only(wanda, tmp_path, monkeypatch):
    dense, masks = wanda.parent / "dense", dict(prunus.masks(wanda))
    prunus.prune(dense, tmp_path / "out", masks=masks)
    prunus.prune(dense, tmp_path / "out", masks=masks)
    with pytest.raises(FileExistsError, match="another masks_sha256"):
        prunus.prune(dense, tmp_path / "out", masks=masks | {Q: ~masks[Q]})
    with pytest.raises(ValueError, match="give them again"):
        prunus.prune(dense, tmp_path / "new", recipe=prunus.Manifest.load(tmp_path / "out").recipe)


def test_masks_that_do_not_fit_are_refused_before_any_work(wanda, tmp_path):
    dense, masks = wanda.parent / "dense", dict(prunus.masks(wanda))
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    wrong = {
        "did you mean model.layers.0.self_attn.q_proj": {"masks": {Q + "j": masks[Q]}},
        r"has shape \(32, 8\), and the weight \(32, 32\)": {"masks": {Q: masks[Q][:, :8]}},
        "must be a bool tensor": {"masks": {Q: masks[Q].float()}},
        "has none for": {"masks": {}},
        "drop sparsity 0.5": {"masks": wanda, "sparsity": 0.5},
        "drop `pattern`": {"masks": wanda, "pattern": "2:4"},
        "drop `allocation`": {"masks": wanda, "allocation": "fisher"},
        "drop `mask_from`": {"masks": wanda, "method": "obs", "mask_from": "magnitude"},
        "drop `head`": {"masks": wanda, "head": True},
        "masks belongs to method obs and mask, not to wanda": {"masks": wanda, "method": "wanda"},
        "give `masks`, a file": {"method": "mask"},
        "holds no masks": {"masks": tmp_path / "plain.safetensors"},
        "has none for the linears": {"masks": {Q: masks[Q]}, "only": ["*.mlp.*"]},
    }
    for words, options in wrong.items():
        assert_refused(ValueError, words, prunus.prune, dense, tmp_path / "out", **options)
    missing = tmp_path / "missing.safetensors"
    assert_refused(
        FileNotFoundError, "no file .*missing", prunus.prune, dense, tmp_path / "out", masks=missing
    )
    assert_refused(ValueError, "must end in .safetensors", prunus.masks, wanda, tmp_path / "a.pt")
    nowhere = tmp_path / "no" / "a.safetensors"
    assert_refused(FileNotFoundError, "make it first", prunus.masks, wanda, nowhere)
    assert_refused(FileNotFoundError, "make it first", prunus.statistics, dense, output=nowhere)


def test_an_output_replaces_no_file_of_another_kind(wanda, tmp_path, monkeypatch):
    """Neither the model's own weights, nor its configuration, nor what somebody else wrote."""
    monkeypatch.chdir(shutil.copytree(wanda, tmp_path / "model"))
    weights = next(iter(shards(Path()).keys()))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for work in (
        lambda: prunus.masks(".", weights),
        lambda: prunus.statistics(".", token_ids(), output=weights),
        lambda: prunus.report(".", "README.md"),
    ):
        before = tree(tmp_path)
        with pytest.raises(FileExistsError, match="was not written by this command; it is left"):
            work()
        assert tree(tmp_path) == before
    (tmp_path / "results.json").write_text("5")
    for file in ("config.json", "../x.gguf", "prunus.json", "../results.json"):
        before = tree(tmp_path)
        said = call("inspect", ".", "--json", file, status=2).stderr
        assert "was not written by this command" in said and tree(tmp_path) == before
    for _ in range(2):
        call("inspect", ".", "--json", "figures.json")
        prunus.masks(".", "masks.safetensors")


def test_a_damaged_file_of_masks_is_refused(wanda, tmp_path):
    file = tmp_path / "masks.safetensors"
    prunus.masks(wanda, file)
    assert prunus.masks(file).sha256 == prunus.masks(wanda).sha256
    content = file.read_bytes()
    file.write_bytes(content.replace(b"[32, 32]", b"[32, 99]", 1))
    assert_refused(ValueError, "damaged", prunus.masks, file)
    file.write_bytes(content.replace(b"[32, 32]", b"[32, -9]", 1))
    assert_refused(ValueError, "does not describe masks", prunus.masks, file)
    file.write_bytes(content[:-1])
    assert_refused(ValueError, "not a whole safetensors file", prunus.masks, file)


def test_inspect_compares_the_zeros_of_two_models(wanda, tmp_path):
    dense = wanda.parent / "dense"
    prunus.prune(dense, tmp_path / "b", "magnitude", sparsity=0.25, group="row")
    masks, others = prunus.masks(wanda), prunus.masks(tmp_path / "b")
    for other in (tmp_path / "b", others):
        found = prunus.inspect(wanda, other)
        assert [*found.compared] == [*masks, "all"]
        for name in masks:
            each, a, b = found.compared[name], masks[name], others[name]
            assert each["equal"] == pytest.approx(float((a == b).float().mean()))
            union = int((a & b).sum()) / int((a | b).sum())
            assert each["intersection_over_union"] == pytest.approx(union)
        assert found.compared["all"]["sparsity"] == masks.sparsity(masks)
    row = found.as_dict()["compared"][Q]
    assert (row["sparsity"], row["other_sparsity"]) == (0.5, 0.25)
    assert [len(table.rows) for table in found.tables()] == [14, 14]
    same = prunus.inspect(dense, dense)
    assert same.compared["all"]["equal"] == 1
    assert same.compared["all"]["intersection_over_union"] is None
    assert prunus.inspect(dense).as_dict()["compared"] == {}
    model = tiny_model("llama", hidden_size=64)
    assert_refused(ValueError, "another model", prunus.inspect, wanda, model)
