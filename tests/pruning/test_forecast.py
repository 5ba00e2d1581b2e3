"""Forecasts for machines that are not present: published shapes, and costs that grow right."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig

from command_line import call
from prunus.hardware.rates import DEVICES, parse_devices
from prunus.model.skeleton import Skeleton
from prunus.pruning.forecast import SHAPES, Shape, find_shape, forecast


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("smollm2-135m", 0.1345),
        ("llama-7b", 6.74),
        ("llama-13b", 13.02),
        ("llama-30b", 32.53),
        ("llama-65b", 65.29),
        ("llama2-70b", 68.98),
        ("llama3-8b", 8.03),
        ("llama3-70b", 70.55),
        ("llama3-405b", 405.85),
    ],
)
def test_shapes_have_as_many_weights_as_published(name, billions):
    found = forecast(find_shape(name), parse_devices("h100"), "wanda", 128, 2048)
    assert found["weights"] / 1e9 == pytest.approx(billions, rel=0.002)
    assert found["disk"] == 2 * found["weights"]


def test_linears_are_those_that_a_run_finds():
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        vocab_size=32,
    )
    skeleton = Skeleton(config, torch.float32)
    assert Shape(64, 96, 1, 4, 2, 24, 32).linears == [x.shape for x in skeleton.linears(0)]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("devices", ["4-cores", "8xh100"])
def test_costs_grow_with_width_depth_and_windows(method, devices):
    chosen, small = parse_devices(devices), Shape(1024, 4096, 8, 8, 8, 128, 1000)

    def cost(shape: Shape = small, windows: int = 64) -> dict:
        return forecast(shape, chosen, method, windows, 2048)

    def in_blocks(found: dict, blocks: int = 8) -> float:
        parts = found["parts"]
        # The first block is read, and the last one written, with nothing beside it.
        alone = (parts["reading"] + parts["writing"]) / blocks
        return found["seconds"] - parts["start"] - parts["embeddings"] - alone

    deeper, wider = (
        cost(Shape(1024, 4096, 16, 8, 8, 128, 1000)),
        cost(Shape(2048, 8192, 8, 16, 16, 128, 1000)),
    )
    assert in_blocks(deeper, 16) == pytest.approx(2 * in_blocks(cost())), "blocks cost alike"
    assert deeper["memory"] == cost()["memory"], "memory is a block"
    assert in_blocks(wider) > 2 * in_blocks(cost())
    more = cost(windows=128)
    assert (more["parts"]["forward"] > cost()["parts"]["forward"]) == (method != "magnitude")
    # Files are read and written beside the rest, but one block's before it and one's after it.
    files = [more["parts"].pop(name) for name in ("reading", "writing")]
    assert more["parts"]["transfers"] > 0 if "h100" in devices else "transfers" not in more["parts"]
    outside = more["parts"].pop("start") + more["parts"].pop("embeddings")
    beside = max(sum(more["parts"].values()), *files)
    assert beside + outside + sum(files) / small.blocks == pytest.approx(more["seconds"])


def test_ranks_divide_the_work_and_pay_for_it_in_traffic():
    shape = find_shape("llama-7b")

    def at(ranks: int, method: str = "sparsegpt") -> dict:
        return forecast(shape, parse_devices(f"{ranks}xh100"), method, 128, 2048)

    assert at(1)["traffic"] == 0
    assert at(1)["parts"]["communication"] == 0
    assert at(8)["parts"]["forward"] == pytest.approx(at(1)["parts"]["forward"] / 8)
    assert at(8)["parts"]["communication"] > at(2)["parts"]["communication"] > 0
    assert at(8)["memory"] < at(1)["memory"]
    assert at(8, "wanda")["traffic"] < at(8)["traffic"] / 50, (
        "norms are small, Gram matrices are not"
    )
    assert at(1000)["windows_per_rank"] == 2, "ranks split the windows by whole batches"


def test_windows_that_do_not_fit_on_a_device_are_replayed():
    shape = find_shape("llama3-405b")
    one, eight = (forecast(shape, parse_devices(x), "wanda", 128, 2048) for x in ("a100", "8xa100"))
    assert one["lockstep"] is False
    assert eight["lockstep"] is True
    assert one["parts"]["forward"] == pytest.approx(5 * 8 * eight["parts"]["forward"])


def test_devices():
    assert parse_devices("8xh100").ranks == 8
    assert parse_devices("h100").rates is DEVICES["h100"]
    cores = parse_devices("4x8-cores")
    assert (cores.ranks, cores.rates.products) == (4, 8 * DEVICES["core"].products)
    assert cores.rates.link == DEVICES["core"].link
    for wrong in ("", "h99", "0xh100", "core", "8x", "8-h100"):
        with pytest.raises(ValueError, match="are unknown"):
            parse_devices(wrong)


def test_the_command_says_where_its_rates_come_from(tmp_path):
    file = tmp_path / "plan.json"
    said = call(
        "plan", "--model-shape", "llama3-405b", "--devices", "8xh100", "--json", file
    ).output
    assert "NOT measured" in said
    basis = "vendors' peak figures times an assumed share of 0.5, not measured"
    assert basis in " ".join(said.split())
    assert json.loads(file.read_text())["ranks"] == 8
    assert json.loads(file.read_text())["basis"] == basis
    said = call("plan", "--model-shape", "llama-7b", "--devices", "2-cores").output
    assert "measured by benchmarks/cost_constants.py" in said
    assert "rates measured on one processor core" in " ".join(said.split())
    assert "give either MODEL" in call("plan", status=2).output
    assert "is unknown: choose one of" in call("plan", "--model-shape", "llama-9b", status=2).output
    assert (
        "is not forecast"
        in call("plan", "--model-shape", "llama-7b", "--method", "alps", status=2).output
    )


def test_every_shape_can_be_forecast_on_every_device():
    for name in SHAPES:
        for device in ("2-cores", *(x for x in DEVICES if x != "core")):
            assert (
                forecast(find_shape(name), parse_devices(device), "wanda", 1, 8)["seconds"] > 0
            ), (
                name,
                device,
            )
