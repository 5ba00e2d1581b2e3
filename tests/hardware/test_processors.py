"""Every command on every kind of processor: what a run does depends on what multiplies fast there.

A case is a family of models (with RMSNorm, or with LayerNorm), the dtype of its checkpoint, and
whether the processor multiplies bfloat16 natively.
"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import prunus
from gguf_cases import gguf_checkpoint
from processors import processor
from prunus.engine.reconstruction import reconstruct_block
from prunus.hardware import numerics
from prunus.hardware.numerics import (
    all_finite,
    fast_linears,
    low_precision_factor,
    low_precision_product,
)
from recovery_cases import recover, training_text
from tiny import token_ids
from tiny_tokenizer import dense_checkpoint

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: A LayerNorm returns the dtype of its input, which float32 weights refuse, so that a wrong dtype
#: shows with it. An RMSNorm takes any dtype, and two cases of 16 bits are enough.
CASES = [
    pytest.param(case, id=f"{case[0]}-{str(case[1])[6:]}-{'native' if case[2] else 'without'}")
    for case in (
        *itertools.product(["gpt_neo"], DTYPES, [True, False]),
        ("llama", torch.bfloat16, True),
        ("llama", torch.float16, False),
    )
]
IDS = token_ids(6, 32)


@pytest.fixture
def dense(request, tmp_path, monkeypatch):
    """The folder of a checkpoint of the case, on its processor."""
    family, dtype, native = request.param
    # One training step for the short windows of these tests.
    monkeypatch.setattr(reconstruct_block, "_TOKENS_PER_STEP", 64)
    with processor(native):
        yield dense_checkpoint(tmp_path / "dense", family, dtype)


@pytest.mark.parametrize("native", [True, False])
def test_the_processor_of_a_test_is_the_one_that_prunus_sees(native):
    with processor(native):
        assert numerics.native_bfloat16() == native


@pytest.mark.parametrize("dense", CASES, indirect=True)
@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
def test_every_preset_prunes(preset, dense, tmp_path):
    report = prunus.prune(dense, tmp_path / "out", preset=preset, calibration=IDS, batch=1)
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("dense", CASES, indirect=True)
def test_compress_shrink_and_recover_run(dense, tmp_path):
    packed = prunus.compress(dense, tmp_path / "packed", bits=4, calibration=IDS)
    assert packed.state == "finished"
    shallow = prunus.shrink(dense, tmp_path / "shallow", blocks=1, calibration=IDS)
    assert shallow.state == "finished"
    short = {"tokens": 32, "evaluations": 1, "teacher": dense, "dtype": "auto"}
    better = tmp_path / "better"
    recover(tmp_path / "shallow", better, "full", training_text(tmp_path), **short)
    model, _ = prunus.load(better)
    assert all(all_finite(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("native", [True, False])
def test_a_gguf_file_is_written(native, dtype, tmp_path, monkeypatch):
    """With the best kernels, and without any."""
    monkeypatch.setenv("PRUNUS_ISA", "best" if native else "off")
    with processor(native):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        folder = gguf_checkpoint(tmp_path / "dense", dtype=dtype, **sizes)
        record = prunus.compress(folder, tmp_path / "out.gguf", bits=5, calibration=IDS)
    assert record.state == "finished"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1.0])
def test_weights_that_are_not_finite_are_noticed_also_under_autocast(value, dtype):
    weight = torch.ones(3, 4, dtype=dtype)
    weight[1, 2] = value
    with torch.autocast("cpu", torch.bfloat16):
        assert all_finite(weight) == (value == 1.0)


# --- low-precision products ---


@pytest.mark.parametrize(("native", "size"), [(True, 300), (False, 300), (True, 7)])
def test_large_products_are_right_to_a_few_bits_and_small_ones_exact(native, size, monkeypatch):
    monkeypatch.setattr("prunus.hardware.numerics.native_bfloat16", lambda: native)
    left, right = torch.randn(size, size), torch.randn(size, size)
    exact, found = left @ right, low_precision_product(left, right)
    assert found.dtype == torch.float32
    error = float((found - exact).norm() / exact.norm())
    assert error < 0.005
    assert (error == 0) == (not native or size == 7)


@pytest.mark.parametrize(("rows", "native"), [(2, True), (300, True), (300, False)])
def test_a_factor_rounded_once_gives_the_same_products(rows, native, monkeypatch):
    monkeypatch.setattr("prunus.hardware.numerics.native_bfloat16", lambda: native)
    left, right = torch.randn(rows, 300), torch.randn(300, 300)
    found = low_precision_product(left, low_precision_factor(right, rows))
    assert torch.equal(found, low_precision_product(left, right))


class Products(TorchDispatchMode):
    """Collects the dtypes in which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("addmm", "linear", "matmul", "mm"):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("layer", [torch.nn.Linear(40, 30), Conv1D(30, 40)], ids=str)
def test_linears_of_16_bits_are_as_exact_in_float32(layer, native, monkeypatch):
    monkeypatch.setattr("prunus.hardware.numerics.native_bfloat16", lambda: native)
    layer, x = layer.bfloat16(), torch.randn(3, 9, 40).bfloat16()
    torch.nn.init.normal_(layer.bias)
    with torch.inference_mode(), fast_linears(), Products() as products:
        found = layer(x)
    assert products.dtypes == {torch.bfloat16 if native else torch.float32}
    with torch.no_grad():
        exact = layer.float()(x.float())
    torch.testing.assert_close(found, exact.bfloat16(), rtol=0.01 if native else 0, atol=0)


def test_other_uses_of_addmm_stay_as_they_are(monkeypatch):
    monkeypatch.setattr("prunus.hardware.numerics.native_bfloat16", lambda: False)
    added, left, right = (torch.randn(9, 9).bfloat16() for _ in range(3))
    with fast_linears():
        scaled = torch.addmm(added[0], left, right, beta=2)
        assert torch.equal(torch.addmm(added, left, right), torch.addmm(added, left, right))
    assert torch.equal(scaled, torch.addmm(added[0], left, right, beta=2))
