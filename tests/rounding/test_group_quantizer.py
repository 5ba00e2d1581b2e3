"""Weights as GGUF's types: bytes, fits, and the sweep with feedback."""

import itertools
from dataclasses import replace

import pytest
import torch

from method_cases import ThreeShards
from prunus.formats.compressed_tensors import fp4_type, integer_type
from prunus.formats.gguf.package import package
from prunus.formats.gguf.types import TYPES, CodebookType, GgufType, type_for
from prunus.kernels import library as kernels
from prunus.kernels.library import ISAS
from prunus.methods import InputStatistics, Work
from prunus.methods.solvers.obs import inverse_factor
from prunus.rounding import group_sweep
from prunus.rounding.codebooks import find_codewords
from prunus.rounding.group_fits import fit_scales, round_to_nearest, rounded_rows, span_fit
from prunus.rounding.group_sweep import GroupRounding, round_weight
from refusals import assert_refused

pytest.importorskip("gguf", reason="the package gguf is the reference, and has the codebooks")

PACKED = {f"W{bits}A16": integer_type(bits, 128, torch.bfloat16) for bits in (2, 4, 7, 8)}
PACKED |= {"NVFP4": fp4_type("NVFP4", 4.0), "MXFP4 of a folder": fp4_type("MXFP4")}
every_type = pytest.mark.parametrize("quantizer", TYPES.values(), ids=TYPES)
every_quantizer = pytest.mark.parametrize(
    "quantizer", [*TYPES.values(), *PACKED.values()], ids=[*TYPES, *PACKED]
)
CODEBOOKS = [x for x in TYPES.values() if isinstance(x, CodebookType)]
every_codebook = pytest.mark.parametrize("quantizer", CODEBOOKS, ids=lambda x: x.name)


#: Eigenvectors of the inputs of `statistics_of` that are far larger than all others.
LEADING = 40


def random_spans(quantizer: GgufType, count: int = 20) -> torch.Tensor:
    """Spans of random integers, and of scales that are ordinary numbers: uint8 (N, bytes)."""
    data_NK = torch.randint(0, 256, (count, quantizer.nbytes), dtype=torch.uint8)
    if quantizer.name == "Q8_0":
        data_NK[data_NK == 128] = 0  # −128 is a value that no writer uses
    if isinstance(quantizer, CodebookType):
        data_NK[:, :2] = torch.randn(count, 1).half().view(torch.uint8)
        return data_NK
    start = 0
    groups = quantizer.span // quantizer.group * (2 if quantizer.has_minimum else 1)
    for part, bits, _, _ in quantizer.layout:
        if part in ("levels", "codes"):
            start += bits * (quantizer.span if part == "levels" else groups) // 8
        else:
            number_N1 = torch.randn(count, 1).to(quantizer.dtype).view(torch.uint8)
            data_NK[:, start : start + number_N1.shape[1]] = number_N1
            start += number_N1.shape[1]
    return data_NK


def statistics_of(columns: int) -> InputStatistics:
    statistics = InputStatistics(columns, "gram")
    statistics.add(torch.randn(300, 40) @ torch.randn(40, columns) + torch.randn(300, columns))
    return statistics


def error(weight_OI: torch.Tensor, other_OI: torch.Tensor, gram_II: torch.Tensor) -> float:
    change_OI = weight_OI - other_OI
    return float(((change_OI @ gram_II) * change_OI).sum())


@pytest.mark.parametrize("isa", ["", "off"])
@every_type
def test_bytes_are_read_and_written_as_the_package_gguf_does(quantizer, isa, monkeypatch):
    monkeypatch.setenv("PRUNUS_ISA", isa)
    data_NK, gguf = random_spans(quantizer), package()
    spans = quantizer.unpack(data_NK)
    if quantizer.name != "Q2_0":  # which the package cannot decode; see the next test
        kind = gguf.GGMLQuantizationType(quantizer.number)
        assert kind.name == quantizer.name
        assert (quantizer.span, quantizer.nbytes) == gguf.GGML_QUANT_SIZES[kind]
        expected = torch.from_numpy(gguf.quants.dequantize(data_NK.numpy(), kind))
        assert torch.equal(spans.dense(quantizer), expected)
    assert torch.equal(quantizer.pack(spans), data_NK)


def test_q2_0_has_two_bits_of_four_neighbours_in_a_byte():
    data_NK = torch.tensor([*torch.tensor([-0.5]).half().view(torch.uint8), *[0b11100100] * 16])
    weight_NB = TYPES["Q2_0"].unpack(data_NK[None].byte()).dense(TYPES["Q2_0"])
    assert weight_NB.tolist() == [[0.5, 0.0, -0.5, -1.0] * 16]


def test_all_scales_and_codes_of_mxfp4_are_those_of_the_package_gguf():
    """From byte 253 on, weights leave float32."""
    codes_K = torch.arange(16).repeat(2).view(2, 16)
    data_NK = torch.cat(
        [torch.arange(253)[:, None], (codes_K[0] | codes_K[1].flip(0) << 4).expand(253, -1)], 1
    ).byte()
    spans = TYPES["MXFP4"].unpack(data_NK)
    expected = torch.from_numpy(
        package().quants.dequantize(data_NK.numpy(), package().GGMLQuantizationType(39))
    )
    assert torch.equal(spans.dense(TYPES["MXFP4"]), expected)
    assert torch.equal(TYPES["MXFP4"].pack(spans), data_NK)


@pytest.mark.parametrize("power", [1, 8])
def test_no_other_power_of_two_has_a_smaller_error(power):
    """A larger power of the weights makes blocks with few large ones, which are cut off."""
    kind, importance_I = TYPES["MXFP4"], torch.rand(64) + 0.1
    weight_OI = torch.randn(16, 64)
    weight_OI *= weight_OI.abs() ** (power - 1)
    weight_NB, importance_NB = weight_OI.view(-1, 32), importance_I.view(-1, 32).repeat(16, 1)
    values, errors = torch.tensor(kind.values), []
    for step in 2.0 ** torch.arange(-20, 40):
        index_NB = (weight_NB[..., None] / step - values).abs().argmin(2)
        errors.append(((values[index_NB] * step - weight_NB).square() * importance_NB).sum(1))
    found_NB = round_to_nearest(weight_OI, kind, importance_I).dense().view(-1, 32)
    error_N = ((found_NB - weight_NB).square() * importance_NB).sum(1)
    assert (error_N <= torch.stack(errors).amin(0) * 1.00001).all()


def test_widths_that_256_does_not_divide_get_the_types_of_llama_cpp():
    assert type_for("Q4_K", 512) is TYPES["Q4_K"]
    assert type_for("Q4_K", 576) is TYPES["Q5_0"]
    assert_refused(ValueError, "give a width that 32 divides", type_for, "Q8_0", 100)
    assert_refused(ValueError, "not a type that prunus writes", type_for, "Q9_K", 512)


@every_quantizer
def test_a_rounded_weight_has_the_values_of_the_quantizer_and_is_close(quantizer):
    weight_OI = torch.randn(8, 512)
    rounded = round_to_nearest(weight_OI, quantizer)
    dense_OI = rounded.dense()
    spans = quantizer.unpack(rounded.data_OB.view(-1, quantizer.nbytes))
    assert torch.equal(quantizer.pack(spans).view(8, -1), rounded.data_OB)
    assert (weight_OI - dense_OI).square().mean() < 4.0 ** (1.6 - quantizer.bits)
    again_OI = round_to_nearest(dense_OI, quantizer).dense()
    assert (again_OI - dense_OI).square().mean() < 0.1 * (weight_OI - dense_OI).square().mean()


@pytest.mark.parametrize("isa", [None, "off"])
@every_quantizer
def test_a_few_rows_are_rounded_at_once_to_the_same_values(quantizer, isa, monkeypatch):
    """Sums are added in another order, so the scales of a span here and there may differ."""
    if isa is not None:
        monkeypatch.setenv("PRUNUS_ISA", isa)
    weight_OI, importance_I = torch.randn(5, 1024), torch.rand(1024) + 0.1
    importance_I[256:512] *= 50
    for kind in (quantizer, replace(quantizer, columns=tuple(torch.randperm(1024).tolist()))):
        dense_OI = round_to_nearest(weight_OI, kind, importance_I).dense()
        at_once_OI = rounded_rows(weight_OI, kind, importance_I)
        is_same_OI = torch.isclose(at_once_OI, dense_OI, rtol=1e-3, atol=1e-6)
        assert is_same_OI.float().mean() > 0.8
        errors = [(x - weight_OI).square() @ importance_I for x in (at_once_OI, dense_OI)]
        assert torch.allclose(*errors, rtol=0.01)


def test_the_importance_of_a_column_lowers_its_error():
    weight_OI, importance_I = torch.randn(8, 256), torch.ones(256)
    importance_I[::4] = 100
    with_it = (
        round_to_nearest(weight_OI, TYPES["Q3_K"], importance_I).dense() - weight_OI
    ).square()
    without = (round_to_nearest(weight_OI, TYPES["Q3_K"]).dense() - weight_OI).square()
    assert with_it[:, ::4].sum() < without[:, ::4].sum()
    assert (with_it * importance_I).sum() < (without * importance_I).sum()


def test_weights_of_unused_inputs_are_kept():
    weight_OI, importance_I = torch.ones(2, 256), torch.zeros(256)
    for _ in range(2):
        assert (
            round_to_nearest(weight_OI, TYPES["Q3_K"], importance_I).dense() - 1
        ).abs().max() < 0.05
        importance_I[:128] = 1


def test_zeros_stay_zeros():
    for quantizer in (*TYPES.values(), *PACKED.values()):
        assert not round_to_nearest(torch.zeros(2, 256), quantizer).dense().any()


@pytest.mark.parametrize(
    "quantizer",
    [*(TYPES[x] for x in ("Q2_K", "Q3_K", "IQ4_NL", "IQ2_S", "IQ3_S")), PACKED["W4A16"]],
    ids=lambda x: x.name,
)
def test_the_sweep_equals_a_slow_one(quantizer, monkeypatch):
    monkeypatch.setattr(group_sweep, "_LEADING", LEADING)
    weight_OI, statistics = torch.randn(4, 512) / 20, statistics_of(512)
    found = round_weight(weight_OI, statistics, Work(rounding=GroupRounding(quantizer)))

    # Large inputs first: spans, groups within a span, columns within a group. Columns whose signs
    # and magnitudes are chosen together stay together.
    unit = quantizer.unit
    norms_I, groups = statistics.gram_II.diagonal(), quantizer.span // quantizer.group

    def largest_first(j: int) -> list[float]:
        starts = [(j // width * width, width) for width in (quantizer.span, quantizer.group, unit)]
        return [-float(norms_I[start : start + width].sum()) for start, width in starts]

    order = sorted(range(512), key=largest_first)
    # Half of the correlations count, and all along the largest eigenvectors.
    gram_II = statistics.gram_II[order][:, order]
    values_I, vectors_II = torch.linalg.eigh(gram_II.double())
    values_I[:-LEADING] = 0
    half_II = (gram_II / 2 + (vectors_II * values_I) @ vectors_II.T / 2).float()
    half_II.diagonal().copy_(gram_II.diagonal())
    upper_II = inverse_factor(half_II, found.notes["damping"])[0].double()
    left_OI, rounded_OI = weight_OI[:, order].double(), torch.empty(4, 512)
    # What an error in a column costs, if no other column of its unit has one.
    importance_I = torch.cat(
        [
            upper_II[start : start + unit, start : start + unit].inverse().square().sum(1)
            for start in range(0, 512, unit)
        ]
    ).float()
    for place, j in enumerate(order):
        group = j % quantizer.span // quantizer.group
        if place % quantizer.span == 0:
            span = torch.arange(place, place + quantizer.span)
            span = span[torch.tensor(order)[span].argsort()]
            scales = fit_scales(
                left_OI[:, span].T.float().contiguous(), importance_I[span], quantizer
            )
        if place % quantizer.group == 0 and groups > 1:
            own = slice(place, place + quantizer.group)
            one = scales._replace(
                codes_GO=scales.codes_GO[[group]], minima_GO=scales.minima_GO[[group]]
            )
            fit = span_fit(left_OI[:, own].T.float().contiguous(), importance_I[own], quantizer)
            one = fit.best_codes(one)
            scales.codes_GO[group], scales.minima_GO[group] = one.codes_GO[0], one.minima_GO[0]
        step_O, offset_O = (each_GO[group] for each_GO in scales.steps())
        if unit == 1:
            values_KO1 = torch.tensor(quantizer.values)[:, None, None] * step_O[:, None]
            rows_KO1 = values_KO1 - offset_O[:, None]
        else:
            rows_KO1 = quantizer.grid_KC[:, None] * step_O[:, None]
        width = rows_KO1.shape[2]
        if place % width == 0:
            own = slice(place, place + width)
            target_O1 = left_OI[:, own] if unit == 1 else left_OI[:, own].abs()
            costs_KO = ((rows_KO1 - target_O1).square() * importance_I[own]).sum(2)
            signs_O1 = 1 if unit == 1 else left_OI[:, own].sign()
            chosen_O1 = rows_KO1[costs_KO.argmin(0), torch.arange(4)] * signs_O1
        rounded_OI[:, j] = chosen_O1[:, place % width]
        if (place + 1) % width == 0:
            for at in range(place + 1 - width, place + 1):
                error_O = (left_OI[:, at] - rounded_OI[:, order[at]]) / upper_II[at, at]
                left_OI[:, at + 1 :] -= error_O[:, None] * upper_II[at, at + 1 :]
    # The outputs of every row get the length that they had.
    weighted_OI = weight_OI @ statistics.gram_II
    gain_O = (weighted_OI * weight_OI).sum(1) / (weighted_OI * rounded_OI).sum(1)
    rounded_OI *= gain_O[:, None]
    scale = float(rounded_OI.abs().max())
    assert ((found.weight_OI - rounded_OI).abs() > 0.003 * scale).float().mean() < 0.02
    assert torch.equal(found.weight_OI, found.rounded.dense())


@every_quantizer
def test_feedback_lowers_the_error_of_the_outputs(quantizer):
    weight_OI, statistics = torch.randn(8, 512), statistics_of(512)
    gram_II = statistics.gram_II
    found = round_weight(weight_OI, statistics, Work(rounding=GroupRounding(quantizer)))
    rounded_OI = round_to_nearest(weight_OI, quantizer, gram_II.diagonal()).dense()
    assert error(weight_OI, found.weight_OI, gram_II) < 0.7 * error(weight_OI, rounded_OI, gram_II)


@every_codebook
def test_codewords_are_the_best_of_all_for_their_scales(quantizer):
    """Every row of the grid is tried with all signs that the type allows."""
    weight_OI, importance_I = torch.randn(3, 256), torch.rand(256) + 0.1
    rounded = round_to_nearest(weight_OI, quantizer, importance_I)
    spans, dense_OI, grid_KC = (
        quantizer.unpack(rounded.data_OB),
        rounded.dense(),
        quantizer.grid_KC,
    )
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=8)))
    if quantizer.has_even_signs:
        signs = signs[signs.prod(1) > 0]
    errors = []
    for row, start in itertools.product(range(3), range(0, 256, 8)):
        columns = slice(start, start + 8)
        step = spans.d_N[row] * spans.codes_NG[row, start // quantizer.group]
        parts = signs.view(len(signs), -1, grid_KC.shape[1])
        target = (weight_OI[row, columns] * signs).view(parts.shape)
        error = (target[:, :, None] - step * grid_KC).square()
        error = (error * importance_I[columns].view(parts.shape[1], 1, -1)).sum(3)
        change = dense_OI[row, columns] - weight_OI[row, columns]
        best = error.amin(2).sum(1).min()
        errors.append((float((change.square() * importance_I[columns]).sum()), float(best)))
    actual, best = (sum(x) for x in zip(*errors, strict=True))
    # The factor of the row is multiplied with its scales at the end. And the sign that an even
    # number of them costs is chosen before the row of the grid.
    assert actual <= best * (1.05 if quantizer.has_even_signs else 1.02)


@pytest.mark.parametrize(("codebook", "scalar"), [("IQ3_S", "Q3_K"), ("IQ2_S", "Q2_K")])
def test_codebooks_have_smaller_errors_than_other_types_of_their_bits(codebook, scalar):
    weight_OI, importance_I = torch.randn(16, 512), torch.rand(512)
    codebook_error, scalar_error = (
        ((round_to_nearest(weight_OI, kind, importance_I).dense() - weight_OI) ** 2 @ importance_I)
        for kind in (TYPES[codebook], TYPES[scalar])
    )
    assert TYPES[codebook].bits <= TYPES[scalar].bits
    assert codebook_error.sum() < 0.85 * scalar_error.sum()


@pytest.mark.parametrize("isa", [*(x for x in ISAS if x not in ("amx", "avx512-bf16")), "off"])
@pytest.mark.parametrize("columns", [4, 8])
def test_every_instruction_set_finds_the_best_codewords(isa, columns, monkeypatch):
    try:
        compiled = kernels.load_kernels(isa)
    except ValueError as lacking:
        pytest.skip(str(lacking))
    monkeypatch.setattr(kernels, "load_kernels", lambda: compiled)
    # Halves of rows recur, as in the grids of llama.cpp.
    grid_KC = torch.rand(3)[torch.randint(3, (40, columns))]
    target_WCO, importance_WC = 4 * torch.rand(3, columns, 301), torch.rand(3, columns)
    least_WO, index_WO = find_codewords(target_WCO, importance_WC, grid_KC)
    for word, output in itertools.product(range(3), range(0, 301, 20)):
        sums_K = grid_KC.square() @ importance_WC[word] / 2 - grid_KC @ target_WCO[word, :, output]
        assert abs(float(least_WO[word, output] - sums_K.min())) < 1e-5
        assert float(sums_K[index_WO[word, output]] - sums_K.min()) < 1e-5


@every_quantizer
def test_rounding_with_feedback_keeps_the_length_of_outputs(quantizer):
    """Rounding alone makes them shorter, by 5 % and more at two bits."""
    weight_OI, statistics = torch.randn(8, 512) / 20, statistics_of(512)
    found = round_weight(weight_OI, statistics, Work(rounding=GroupRounding(quantizer)))
    weighted_OI = weight_OI @ statistics.gram_II
    kept_O = (weighted_OI * found.weight_OI).sum(1) / (weighted_OI * weight_OI).sum(1)
    # A scale of eight bits cannot hold the factor that makes them as long.
    assert (kept_O - 1).abs().max() < (0.02 if quantizer.has_coarse_scale else 0.004)


def test_processes_that_share_the_rows_get_the_same_weight():
    weight_OI, statistics = torch.randn(8, 512), statistics_of(512)
    nearest = GroupRounding(TYPES["Q4_K"], statistics.sum_squares_I.float())
    for rounding in (GroupRounding(TYPES["Q4_K"]), nearest):
        work = Work(rounding=rounding)
        alone = round_weight(weight_OI, statistics, work)
        shared = round_weight(weight_OI, statistics, replace(work, rows=ThreeShards()))
        assert (alone.weight_OI != shared.weight_OI).float().mean() < 0.02
        assert torch.equal(shared.weight_OI, shared.rounded.dense())
    assert torch.equal(shared.weight_OI, round_to_nearest(weight_OI, *nearest).dense())
