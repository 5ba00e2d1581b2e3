"""Permuted inputs, folded into the weights that write them, leave the dense model unchanged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import prunus
from command_line import call
from prunus.model.block_lists import find_block_list
from prunus.model.linears import find_linears
from prunus.pruning.block.permute import (
    KEPT_ORDER,
    Producer,
    find_permutable,
    fold_permutation,
    keeps_outputs,
)
from prunus.pruning.job import PruningJob
from stopping import StopError, stop_after
from tiny import FAMILIES, tiny_checkpoint, tiny_model, token_ids, weights

RIA = {"method": "ria", "pattern": "2:4", "permute": True}
#: Family -> linears whose inputs can be permuted. In Bloom the queries, keys and values of a head
#: are next to each other.
FREE = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "phi3": {"self_attn.o_proj", "mlp.down_proj"},
    "opt": {"self_attn.out_proj", "fc2"},
    "bloom": {"self_attention.dense", "mlp.dense_4h_to_h"},
    "falcon": {"self_attention.dense", "mlp.dense_4h_to_h"},
}


def found_in(model, run):
    """Per block: its linears, and the guess that keeps the outputs for each of them."""
    _, blocks = find_block_list(model)
    heads = model.config.get_text_config().num_attention_heads
    for block in blocks:
        linears = {linear.name: linear for linear in find_linears(block)}
        guesses = find_permutable(list(linears.values()), heads, 4)
        yield (
            block,
            linears,
            {
                name: next((guess for guess in each if keeps_outputs(guess, linears, run)), None)
                for name, each in guesses.items()
            },
        )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_folded_permutation_keeps_the_logits_of_the_dense_model(family):
    model, ids = tiny_model(family).requires_grad_(False), token_ids(2, 16)

    def run():
        return model(input_ids=ids, use_cache=False).logits

    before, moved = run(), 0
    for block, linears, permutable in found_in(model, run):
        if family in FREE:
            assert {name for name, chosen in permutable.items() if chosen} == FREE[family]
        for chosen in filter(None, permutable.values()):
            channels = chosen.channels
            within_GW = torch.stack(
                [torch.randperm(channels.width) for _ in range(channels.groups)]
            )
            order_I = channels.spread(within_GW)
            assert torch.equal(channels.within(order_I), within_GW)
            for key, tensor in fold_permutation(
                block.state_dict(), chosen, order_I, linears
            ).items():
                moved += int((block.get_parameter(key) != tensor).sum())
                block.get_parameter(key).copy_(tensor)
    assert torch.allclose(run(), before, atol=1e-5)
    assert moved > 0 or family not in FREE


def test_a_wrong_guess_is_rejected_and_leaves_the_weights_alone():
    model, ids = tiny_model("llama").requires_grad_(False), token_ids(2, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def run():
        return model(input_ids=ids, use_cache=False).logits

    _, linears, permutable = next(found_in(model, run))
    attention, mlp = permutable["self_attn.o_proj"], permutable["mlp.down_proj"]
    keys = Producer("self_attn.k_proj", attention.producers[0].rows_CGW)
    assert not keeps_outputs(replace(attention, producers=(keys,)), linears, run)
    assert not keeps_outputs(replace(mlp, producers=mlp.producers[:1]), linears, run)
    assert not keeps_outputs(attention, linears, lambda: torch.zeros(1)), (
        "a linear that no token reaches proves nothing"
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("options", [RIA, RIA | {"method": "alps"}], ids=["ria", "alps"])
def test_streamed_replayed_resumed_and_in_place_runs_give_the_same_weights(
    options, tmp_path, monkeypatch
):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16, num_hidden_layers=3)
    arguments = options | {"calibration": token_ids(8, 16), "batch": 2}
    report = prunus.prune(dense, tmp_path / "plain", **arguments)
    plain = weights(tmp_path / "plain")
    for block in report.blocks:
        notes = {name: linear.notes["permuted"] for name, linear in block.linears.items()}
        assert notes["self_attn.o_proj"] == "with self_attn.v_proj"
        assert notes["mlp.down_proj"] == "with mlp.gate_proj, mlp.up_proj"
        assert notes["self_attn.q_proj"] == notes["mlp.up_proj"] == KEPT_ORDER
        for name in block.linears:
            assert (
                int((plain[f"{block.name}.{name}.weight"].view(-1, 4) != 0).sum(dim=1).max()) <= 2
            )

    with pytest.raises(StopError):
        prunus.prune(dense, tmp_path / "resumed", **arguments, progress=stop_after(2))
    prunus.prune(dense, tmp_path / "resumed", **arguments)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    prunus.prune(model, **arguments)
    monkeypatch.setattr(PruningJob, "fits_lockstep", lambda self, index: False)
    prunus.prune(dense, tmp_path / "replayed", **arguments)
    for other in (
        weights(tmp_path / "resumed"),
        model.state_dict(),
        weights(tmp_path / "replayed"),
    ):
        assert all(torch.equal(tensor, plain[key]) for key, tensor in other.items())


def test_a_permutation_keeps_more_of_the_outputs(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", intermediate_size=128)
    arguments = {"method": "alps", "pattern": "2:4", "calibration": token_ids(16, 32)}
    errors = {}
    for permute in (False, True):
        report = prunus.prune(dense, tmp_path / str(permute), permute=permute, **arguments)
        errors[permute] = report.blocks[0].linears["mlp.down_proj"].relative_output_error
    assert errors[True] < errors[False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"permute": True}, "permute is for N:M"),
        ({"permute": True, "pattern": "2:4", "propagate": "block"}, "needs propagate linear"),
    ],
)
def test_options_that_exclude_permute_are_refused(options, message, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        prunus.prune(dense, tmp_path / "out", calibration=token_ids(8, 16), **options)
    assert not (tmp_path / "out").exists()


def test_a_plan_lists_the_linears_whose_inputs_can_be_permuted(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama")
    windows = tmp_path / "ids.safetensors"
    save_file({"input_ids": token_ids(8, 16)}, windows)
    arguments = (
        "plan",
        dense,
        tmp_path / "out",
        "--permute",
        "--pattern",
        "2:4",
        "--calibration",
        windows,
    )
    arguments += ("--samples", 8, "--seqlen", 16)
    shown = " ".join(call(*arguments).output.split())
    call(*arguments, "--json", tmp_path / "plan.json")
    orders = json.loads((tmp_path / "plan.json").read_text())["free_orders"]
    free = {name: follow for name, follow in orders.items() if follow}
    assert free == {
        f"model.layers.{block}.{name}": follow
        for block in range(2)
        for name, follow in (
            ("self_attn.o_proj", "self_attn.v_proj"),
            ("mlp.down_proj", "mlp.gate_proj, mlp.up_proj"),
        )
    }
    assert len(orders) == 14
    assert "order of inputs" in shown
