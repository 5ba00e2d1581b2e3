"""The sparsity of every linear: from the allocation rule, recorded, kept by a resumed run."""

from functools import partial

import pytest
import torch

import prunus
import reference
from prunus.methods.patterns import Pattern
from prunus.model.stream import Stream
from prunus.pruning.allocation import (
    Layer,
    allocate,
    output_errors,
    pruned_models,
    sensitivity_curves,
)
from prunus.pruning.job import plan_run
from prunus.pruning.manifest import Manifest
from prunus.pruning.recipe import Recipe
from prunus.runs.options import RunOptions
from stopping import StopError, stop_after
from tiny import shards, tiny_checkpoint, tiny_model, token_ids

EMBED = Stream.embed


@pytest.mark.parametrize("by", ["block", "linear"])
def test_budget_is_exact_and_every_linear_gets_what_the_manifest_says(by, tmp_path, monkeypatch):
    # The search may decide for a uniform sparsity; here it takes what it found.
    monkeypatch.setattr("prunus.pruning.allocation.output_errors", lambda *a: [5, 4, 3, 2, 1])
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=3)
    report = prunus.prune(
        dense,
        tmp_path / "out",
        sparsity=0.5,
        calibration=token_ids(),
        allocation="search",
        allocation_by=by,
    )
    linears = {
        f"{b.name}.{name}": record for b in report.blocks for name, record in b.linears.items()
    }
    assert set(report.allocation) == set(linears)
    assert len(set(report.allocation.values())) > 1
    for name, record in linears.items():
        rows, columns = record.shape
        assert record.zeros == rows * int(columns * report.allocation[name]), name
    missing = report.totals["weights"] // 2 - report.totals["zeros"]
    assert 0 <= missing < max(record.shape[0] for record in linears.values())


def test_a_resumed_run_keeps_the_same_sparsities(tmp_path, monkeypatch):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=3)
    options = {"calibration": token_ids(), "allocation": "search"}
    prunus.prune(dense, tmp_path / "whole", **options)
    with pytest.raises(StopError):
        prunus.prune(dense, tmp_path / "out", **options, progress=stop_after(1))
    kept = Manifest.load(tmp_path / "out").allocation
    monkeypatch.setattr(
        "prunus.pruning.allocation._measured", lambda *a: pytest.fail("measured twice")
    )
    report = prunus.prune(dense, tmp_path / "out", **options)
    assert report.allocation == kept
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def embedded(folder, ids, batch=2) -> Stream:
    recipe = Recipe(calibration="token ids", samples=len(ids), seqlen=ids.shape[1], dtype="float32")
    job = plan_run(folder, recipe, RunOptions(input_ids=ids))
    stream = Stream(job.skeleton, job.source, job.device)
    stream.embed(ids.split(batch), None)
    return stream


def inputs_of(model, block, ids) -> dict[str, torch.Tensor]:
    """The inputs (tokens, in) of a block's linears, by name under "block."."""
    found: dict[str, list[torch.Tensor]] = {}
    handles = [
        linear.register_forward_pre_hook(partial(reference.collect_inputs, found, name))
        for name, linear in reference.linears(block, "block").items()
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_probes_do_what_pruning_one_block_of_the_whole_model_does(family, tmp_path):
    ids = token_ids(4, 16)
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    names = [linear.name for linear in embedded(tmp_path / "dense", ids).skeleton.linears(0)]
    with torch.no_grad():
        curves = sensitivity_curves(
            embedded(tmp_path / "dense", ids),
            [Layer(0, tuple(names)), Layer(1, tuple(names))],
            [0.25, 0.5],
        )
        blocks = model.model.layers if family == "llama" else model.transformer.h
        outputs: list[torch.Tensor] = []
        hook = blocks[-1].register_forward_hook(
            lambda m, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        inputs = [inputs_of(model, blocks[at], ids) for at in range(2)]
        for at, curve in enumerate(curves):
            assert curve[0] == (0.0, 0.0)
            for sparsity, error in curve[1:]:
                outputs.clear()
                trained = {k: v.clone() for k, v in blocks[at].state_dict().items()}
                model(ids)
                for name, linear in reference.linears(blocks[at], "block").items():
                    weight = reference.weight_of(linear)
                    score = reference.wanda_score(weight, inputs[at][name])
                    weight.mul_(reference.keep_mask(score, Pattern(), sparsity))
                model(ids)
                blocks[at].load_state_dict(trained)
                dense, pruned = outputs
                share = (pruned - dense).square().sum(-1) / dense.square().sum(-1)
                assert error == pytest.approx(float(share.mean()), rel=1e-3)
    hook.remove()


def test_whole_models_are_pruned_in_all_blocks_and_compared_by_their_logits(tmp_path):
    ids = token_ids(3, 16)
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    stream = embedded(tmp_path / "dense", ids, batch=len(ids))
    names = tuple(linear.name for linear in stream.skeleton.linears(0))
    candidates = [[0.25, 0.5], [0.5, 0.25]]
    with torch.no_grad():
        layers = [Layer(0, names), Layer(1, names)]
        found = output_errors(stream, pruned_models(stream, layers, candidates))
        dense = model(ids).logits.log_softmax(-1)
        inputs = [inputs_of(model, block, ids) for block in model.model.layers]
        trained = {name: weight.clone() for name, weight in model.state_dict().items()}
        for sparsities, error in zip(candidates, found, strict=True):
            for block, of_block, sparsity in zip(
                model.model.layers, inputs, sparsities, strict=True
            ):
                for name, linear in reference.linears(block, "block").items():
                    score = reference.wanda_score(linear.weight, of_block[name])
                    linear.weight.mul_(reference.keep_mask(score, Pattern(), sparsity))
            pruned = model(ids).logits.log_softmax(-1)
            model.load_state_dict(trained)
            divergence = (dense.exp() * (dense - pruned)).sum(-1).mean()
            assert error == pytest.approx(float(divergence), rel=1e-3)
    assert found[0] != pytest.approx(found[1], rel=1e-2)


def test_a_search_takes_the_part_that_harms_whole_models_least(tmp_path, monkeypatch):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=3)
    ids, seen = token_ids(8, 16), []

    def sparsities(errors):
        def embed(self, batches, *arguments, **options):
            seen.append(torch.cat(list(batches)))
            return EMBED(self, batches, *arguments, **options)

        monkeypatch.setattr("prunus.model.stream.Stream.embed", embed)
        monkeypatch.setattr("prunus.pruning.allocation.output_errors", lambda *a: errors)
        recipe = Recipe(
            calibration="token ids", samples=8, seqlen=16, dtype="float32", allocation="search"
        )
        found = allocate(plan_run(dense, recipe, RunOptions(input_ids=ids)), ids)
        return torch.tensor(list(found.values()))

    uniform, quarter, whole = (
        sparsities(errors) for errors in ([1, 2, 3, 4, 5], [2, 1, 3, 4, 5], [5, 4, 3, 2, 1])
    )
    assert uniform.unique().tolist() == [0.5]
    assert len(whole.unique()) > 1
    # Every row removes whole weights: the tiny model has rows of 32.
    torch.testing.assert_close(quarter - 0.5, (whole - 0.5) / 4, atol=1 / 16, rtol=0)
    assert torch.equal(seen[0], ids[:4]) and torch.equal(seen[1], ids[4:]), "on unseen windows"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "search", "pattern": "2:4"}, "distributes an unstructured sparsity"),
        ({"allocation_by": "linear"}, "needs an `allocation` other than uniform"),
        ({"allocation": "everything"}, "allocation"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        prunus.prune(dense, tmp_path / "out", calibration=token_ids(), **options)
    assert not (tmp_path / "out").exists()
