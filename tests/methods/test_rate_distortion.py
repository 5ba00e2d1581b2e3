"""Quantising by rate and distortion: against a slow version, against theory, and on odd inputs.

Shape suffixes: O outputs (rows), I inputs (columns), T tokens, K classes, V values -127 to 127.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import reference
from method_cases import WEIRD, ThreeShards, example, gather, weird_example
from prunus.methods import METHODS, MethodOptions, Pruned, Work, compose
from prunus.methods.patterns import Pattern
from prunus.methods.rate_distortion import quantize
from prunus.methods.work import UNSHARDED, CodeLengths, LinearQuantization, RowSharding
from prunus.runtime.plane_codes import MAX_LEVEL

# The distance of entropy coded scalar quantisation from the limit, in squared error: 2πe / 12.
SCALAR_LOSS = 2 * math.pi * math.e / 12


def ideal_code(levels_SI: Tensor) -> CodeLengths:
    """A code for each column, which takes the entropy that its integers have in some rows."""
    values_V = torch.arange(-MAX_LEVEL, MAX_LEVEL + 1)
    counts_IV = (levels_SI.T[:, :, None] == values_V).sum(dim=1) + 0.01
    lengths_IV = -(counts_IV / counts_IV.sum(dim=1, keepdim=True)).log2()
    return CodeLengths(lengths_IV, torch.arange(levels_SI.shape[1]))


def two_classes(levels_SI: Tensor) -> CodeLengths:
    """A code in which odd columns pay more for large integers, whatever the integers are."""
    sizes_V = torch.arange(-MAX_LEVEL, MAX_LEVEL + 1).abs().float()
    return CodeLengths(
        torch.stack([0.5 * sizes_V, 2 * sizes_V]), torch.arange(levels_SI.shape[1]) % 2
    )


def work(how: LinearQuantization, damping: float | None = None, rows=UNSHARDED) -> Work:
    options = MethodOptions.model_construct(damping=damping)
    return Work(Pattern(), 0.0, options, rows, quantization=how)


def quantized(
    weight_OI: Tensor,
    X_TI: Tensor,
    step: float,
    keep_OI: Tensor | None = None,
    damping: float | None = None,
    rows: RowSharding = UNSHARDED,
) -> Pruned:
    """Quantise with the ideal code and equal rows; no argument may change."""
    statistics, before = gather(X_TI), gather(X_TI)
    given_OI = weight_OI.clone()
    how = LinearQuantization(step, torch.ones(len(weight_OI)), ideal_code)
    pruned = quantize(weight_OI, statistics, work(how, damping, rows), keep_OI)
    assert torch.equal(weight_OI, given_OI)
    assert torch.equal(statistics.gram_II, before.gram_II)
    assert pruned.quantized is not None
    levels_OI = pruned.quantized.levels_OI
    assert int(levels_OI.min()) >= -MAX_LEVEL
    assert torch.equal(pruned.keep_OI, levels_OI != 0)
    assert torch.equal(pruned.weight_OI, pruned.quantized.dense())
    assert pruned.weight_OI.isfinite().all()
    return pruned


def output_error(change_OI: Tensor, gram_II: Tensor) -> float:
    return float(((change_OI.double() @ gram_II.double()) * change_OI.double()).sum())


def entropy(levels_OI: Tensor) -> float:
    """Bits per weight, each column with its own distribution."""
    bits = 0.0
    for column in levels_OI.T:
        shares = column.unique(return_counts=True)[1].double() / len(column)
        bits -= float((shares * shares.log2()).sum())
    return bits / levels_OI.shape[1]


# --- against the slow version ---


@pytest.mark.parametrize("code_of", [ideal_code, two_classes])
@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("isa", ["off", "portable", "best"])
def test_integers_and_steps_are_those_of_the_slow_version(
    forced, damping, code_of, isa, monkeypatch
):
    monkeypatch.setenv("PRUNUS_ISA", isa)
    weight_OI, X_TI = example(6, 20)
    X_TI[:, 3] = 0
    weight_OI[2, 5] = 300.0
    scales_O = torch.linspace(0.5, 2, 6)
    keep_OI = torch.rand(6, 20, generator=torch.Generator().manual_seed(1)) < 0.5
    kept = keep_OI if forced else None
    statistics = gather(X_TI)
    how = LinearQuantization(0.7, scales_O, code_of)
    found = quantize(weight_OI, statistics, work(how, damping), kept).quantized
    levels_OI, steps_I = reference.quantize(
        weight_OI, statistics.gram_II, damping, 0.7, scales_O, code_of, kept
    )
    assert torch.equal(found.levels_OI, levels_OI)
    assert torch.equal(found.steps_I.double(), steps_I)
    # Each row of the outputs gets the length that it had, where a factor near 1 is enough.
    scales_O = scales_O.bfloat16().double()
    rounded_OI = levels_OI.double() * steps_I * scales_O[:, None]
    weighted_OI = weight_OI.double() @ statistics.gram_II.double()
    gain_O = (weighted_OI * weight_OI).sum(1) / (weighted_OI * rounded_OI).sum(1)
    scales_O *= torch.where((gain_O > 2 / 3) & (gain_O < 3 / 2), gain_O, 1.0)
    assert (found.scales_O / scales_O - 1).abs().max() < 2**-8


def test_blocks_of_columns_make_no_difference():
    """More columns than a block of the sweep has, and neither a multiple of it nor of a tile."""
    weight_OI, X_TI = example(2, 133, tokens=400)
    statistics = gather(X_TI)
    how = LinearQuantization(0.5, torch.ones(2), two_classes)
    found = quantize(weight_OI, statistics, work(how, 0.1)).quantized
    levels_OI, _ = reference.quantize(
        weight_OI, statistics.gram_II, 0.1, 0.5, torch.ones(2), two_classes
    )
    assert torch.equal(found.levels_OI, levels_OI)


# --- against theory ---


def test_a_massive_input_is_corrected_by_all_the_others():
    """Its column would need far more levels than there are, wherever it stands in the weight."""
    errors = []
    for place in (0, 23):
        weight_OI, X_TI = example(40, 24, tokens=400)
        X_TI /= X_TI.std()
        # Some tokens have a huge value, and all these tokens are alike, as attention sinks are.
        X_TI[::20] = 3.0
        X_TI[::20, place] = 300.0
        found = quantized(weight_OI, X_TI, 0.02, damping=1e-4)
        gram_II = gather(X_TI).gram_II
        change_OI = weight_OI - found.weight_OI
        errors.append(output_error(change_OI, gram_II) / output_error(weight_OI, gram_II))
    assert errors[1] < 2 * errors[0]  # 6 times as large from left to right


@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_the_error_is_within_a_few_per_cent_of_water_filling(spread):
    """On normal weights, with the loss that all scalar quantisers have at a high rate."""
    rows, columns = 3000, 24
    generator = torch.Generator().manual_seed(3)
    weight_OI = torch.randn(rows, columns, generator=generator)
    axes_II = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    variances_I = torch.logspace(0, -math.log10(spread), columns)
    X_TI = variances_I.sqrt()[:, None] * axes_II.T  # XᵀX has these eigenvalues
    found = quantized(weight_OI, X_TI, 0.45, damping=1e-6)
    bits = entropy(found.quantized.levels_OI)
    error = output_error(weight_OI - found.weight_OI, X_TI.T @ X_TI) / rows
    # At this rate every direction gets bits, so water filling has the same error in all of them.
    limit = columns * 4**-bits * float(variances_I.log().mean().exp())
    assert limit < columns * float(variances_I.min())
    assert 2.5 < bits < 4
    assert 0.95 < error / (SCALAR_LOSS * limit) < 1.05


# --- masks, odd inputs, shards ---


@pytest.mark.parametrize("kind", WEIRD)
def test_odd_inputs_give_integers_in_range(kind):
    weight_OI, X_TI = weird_example(kind, 8, 12, 0)
    found = quantized(weight_OI, X_TI, 0.1).quantized
    assert (found.steps_I > 0).all()
    dead_I = X_TI.square().sum(dim=0) == 0
    assert not found.levels_OI[:, dead_I].any()
    # A column of zeros, or of subnormal weights, has a step too.
    weight_OI[:, 2], weight_OI[:, 4] = 0, 1e-44
    assert (quantized(weight_OI, X_TI, 1e-30).quantized.steps_I > 0).all()


@pytest.mark.parametrize("forced", [False, True])
def test_shards_of_rows_give_the_same_integers(forced):
    weight_OI, X_TI = example(31, 24)
    keep_OI = weight_OI.abs() > 0.5 if forced else None
    whole = quantized(weight_OI, X_TI, 0.3, keep_OI)
    shards = quantized(weight_OI, X_TI, 0.3, keep_OI, rows=ThreeShards())
    assert torch.equal(whole.quantized.levels_OI, shards.quantized.levels_OI)
    assert torch.equal(whole.weight_OI, shards.weight_OI)


# --- as a step of a method ---


def work_of(weight_OI: Tensor) -> Work:
    return work(LinearQuantization(0.2, torch.ones(len(weight_OI)), ideal_code))


def composed(weight_OI, X_TI, sparsity, pattern=Pattern(), name="wanda") -> Pruned:  # noqa: B008
    options = MethodOptions()
    method = compose(METHODS[name], options, rounding="feedback")
    assert method.needs == "gram"
    assert method.updates_weights
    statistics = gather(X_TI)
    asked = replace(work_of(weight_OI), pattern=pattern, sparsity=sparsity, options=options)
    return method.apply(weight_OI, statistics, asked)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(2, 4)], ids=repr)
def test_a_method_chooses_zeros_and_quantisation_starts_from_the_trained_weight(name, pattern):
    weight_OI, X_TI = example(20, 24)
    found = composed(weight_OI, X_TI, 0.5, pattern, name)
    chosen = METHODS[name].prune(weight_OI, gather(X_TI), pattern, 0.5)
    alone = quantize(weight_OI, gather(X_TI), work_of(weight_OI), chosen.keep_OI)
    assert torch.equal(found.weight_OI, alone.weight_OI)
    assert not found.weight_OI[~chosen.keep_OI].any()


def test_without_a_sparsity_the_method_forces_no_zeros():
    weight_OI, X_TI = example(20, 24)
    alone = quantize(weight_OI, gather(X_TI), work_of(weight_OI))
    assert torch.equal(composed(weight_OI, X_TI, 0.0).weight_OI, alone.weight_OI)
