"""Runs on a CUDA device prune as runs on the processor do, in every branch of the engine."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import prunus
from devices import PRETEND, assert_same_weights
from prunus.engine.block_memory import Memory
from prunus.methods import statistics
from prunus.methods.solvers import least_squares
from prunus.rounding import loss_sensitivity
from stopping import interrupt
from tiny import tiny_checkpoint, token_ids

pytestmark = pytest.mark.cuda

TRAINED = {"reconstruct": "all", "reconstruct_epochs": 1, "batch": 1}
LAST = {"reconstruct": "last", "batch": 2}
#: Between them, the cases reach every method, update, pattern and allocation.
CASES: dict[str, dict[str, Any]] = {
    "wanda": {},
    "wanda layer": {"group": "layer"},
    "wanda column": {"group": "column"},
    "magnitude": {"method": "magnitude"},
    "magnitude row, with ties": {"method": "magnitude", "group": "row"},
    "wanda-variant": {"method": "wanda-variant"},
    "ria 2:4": {"method": "ria", "pattern": "2:4"},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt 2:4, reconstructed": {"method": "sparsegpt", "pattern": "2:4", **TRAINED},
    "sparsegpt as published": {"method": "sparsegpt", "propagate": "block"},
    "obs blockwise": {"method": "obs", "mask_order": "blockwise"},
    "alps, dense targets": {"method": "alps", "dense_weight": 0.25},
    "alps 1:4, reconstructed": {"method": "alps", "pattern": "1:4", **TRAINED},
    "wanda 2:4, two passes": {"pattern": "2:4", "propagate": "block"},
    "least squares": {"weight_update": "least-squares"},
    "wanda 2:4, last trained": {"pattern": "2:4", **TRAINED, **LAST},
    "head": {"head": True},
    "allocation": {"allocation": "fisher"},
}


def prune(dense: Path, out: Path, device: str, **options: Any) -> Any:
    arguments = {"calibration": token_ids(4, 12), "batch": 2, "dtype": "float32"}
    verb = prunus.compress if "bits" in options else prunus.prune
    return verb(dense, out, device=device, **(arguments | options))


def assert_devices_agree(dense: Path, scratch: Path, **options: Any) -> None:
    for device in ("cpu", "cuda:0"):
        prune(dense, scratch / device, device, **options)
    assert_same_weights(scratch / "cpu", scratch / "cuda:0")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("devices") / "dense"
    return tiny_checkpoint(folder, "llama", torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_every_method_gives_what_the_processor_gives(name, dense, tmp_path):
    assert_devices_agree(dense, tmp_path, **CASES[name])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"method": "alps", "pattern": "2:4"}),
        ("gpt_neo", {"reconstruct": "all", "batch": 1, "dtype": "bfloat16"}),
        ("gemma3_text", {"pattern": "2:4", "reconstruct": "last"}),
        ("mixtral", {"pattern": "2:4", "reconstruct": "all", "batch": 1}),
        ("deepseek_v3", {"method": "alps", "dense_weight": 0.25}),
        ("opt", {"dtype": "bfloat16"}),
        ("bloom", {"weight_update": "least-squares"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_families_give_what_the_processor_gives(family, options, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family)
    assert_devices_agree(dense, tmp_path, **options)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("vit", {"method": "alps", "pattern": "2:4"}),
        ("convnext", {"reconstruct": "all", "reconstruct_epochs": 1, "batch": 1}),
    ],
    ids=["vit", "convnext"],
)
def test_image_classifiers_are_pruned_alike(family, options, tmp_path):
    pytest.importorskip("PIL")
    from pictures import pictures, save_classifier

    dense = save_classifier(tmp_path / "dense", family)
    images = str(pictures(tmp_path / "pictures", per_class=2))
    assert_devices_agree(dense, tmp_path, calibration=images, samples=4, **options)


def test_compression_gives_the_same_bytes(dense, tmp_path, monkeypatch):
    # Autocast leaves other operators in float32 on a GPU than on the processor.
    monkeypatch.setattr(loss_sensitivity, "rounded_products", lambda _: contextlib.nullcontext())
    assert_devices_agree(dense, tmp_path, bits=4.5, format="mlx")


def test_experts_that_no_token_chose_are_compressed(tmp_path):
    sizes = {"num_hidden_layers": 1, "moe_intermediate_size": 32}
    dense = tiny_checkpoint(tmp_path / "dense", "qwen3_moe", **sizes)
    given = {"calibration": torch.full((2, 2), 5), "batch": 1}
    manifest = prune(dense, tmp_path / "out", "cuda:0", bits=8, **given)
    assert manifest.totals["bits"] == 8 + 16 / 32


def test_wide_linears_with_few_tokens_are_pruned_alike(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(least_squares, "_WIDE", 32)
    assert_devices_agree(dense, tmp_path, method="alps", dense_weight=0.25)


def test_compression_withrounded_products_takes_the_same_bits(dense, tmp_path):
    cpu, cuda = (
        prune(dense, tmp_path / device, device, bits=4.5, format="mlx").totals["bits"]
        for device in ("cpu", "cuda:0")
    )
    assert cuda == pytest.approx(cpu, rel=0.02)


@pytest.mark.parametrize(
    ("stay", "spill", "lockstep"),
    [(False, False, True), (False, True, True), (True, False, False)],
    ids=["host memory", "file", "replay"],
)
def test_where_hidden_states_wait_changes_no_byte(
    stay, spill, lockstep, dense, tmp_path, monkeypatch
):
    options = {"method": "alps", "pattern": "2:4", "dense_weight": 0.25, "batch": 1}
    prune(dense, tmp_path / "stay", "cuda:0", **options)
    monkeypatch.setattr(Memory, "hidden_states_stay", property(lambda self: stay))
    monkeypatch.setattr(Memory, "spills", property(lambda self: spill))
    monkeypatch.setattr(Memory, "fits_lockstep", lambda self, index: lockstep)
    prune(dense, tmp_path / "moved", "cuda:0", **options)
    assert_same_weights(tmp_path / "stay", tmp_path / "moved")


def test_a_stopped_run_goes_on_to_the_same_bytes(dense, tmp_path):
    options = {"method": "alps", **TRAINED}
    prune(dense, tmp_path / "whole", "cuda:0", **options)
    interrupt(prune, dense, tmp_path / "parts", "cuda:0", **options)
    prune(dense, tmp_path / "parts", "cuda:0", **options)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_loaded_model_is_pruned_on_its_device(dense, tmp_path):
    from tiny import weights

    expected = prune(dense, tmp_path / "out", "cpu") and weights(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype="auto").to("cuda:0")
    prunus.prune(model, calibration=token_ids(4, 12), batch=2, dtype="float32")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    if PRETEND:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.cpu(), expected[name]), name


def test_products_that_lose_nothing_by_it_use_tf32(dense, tmp_path, monkeypatch):
    """Gram matrices of 16-bit inputs do, those of float32 inputs do not."""
    found, add = [], statistics._add_symmetric

    def recorded(gram_II, X_TI):
        found.append(torch.backends.cuda.matmul.fp32_precision)
        add(gram_II, X_TI)

    monkeypatch.setattr(statistics, "_add_symmetric", recorded)
    before = torch.backends.cuda.matmul.fp32_precision
    for dtype, expected in (("bfloat16", "tf32"), ("float32", before)):
        found.clear()
        prune(dense, tmp_path / dtype, "cuda:0", method="sparsegpt", dtype=dtype)
        assert set(found) == {expected}
    assert torch.backends.cuda.matmul.fp32_precision == before
