"""Extreme numbers for every method: a correct result, or an error that names the linear."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import prunus
from prunus.engine.block.linear import prune_linear
from prunus.engine.linear_record import LinearRecord
from prunus.methods import METHODS, MethodOptions, Work, compose
from prunus.methods.patterns import Pattern
from prunus.methods.statistics import InputStatistics, StatisticsSpec
from prunus.model.linears import Linear
from tiny import tiny_checkpoint, token_ids

NAME = "model.layers.3.mlp.up_proj"
#: Every method alone, and with each kind of option that composes with it.
WAYS = [(name, {}) for name in METHODS]
WAYS += [
    ("obs", {"mask_from": "magnitude"}),
    ("obs", {"mask_order": "blockwise"}),
    ("alps", {"dense_weight": 0.25}),
]
WAYS += [
    ("wanda", {"weight_update": "least-squares"}),
    ("magnitude", {"weight_update": "least-squares"}),
]
IDS = ["-".join([name, *map(str, options.values())]) for name, options in WAYS]
LARGEST_HALF = 65504.0


def inputs(kind: str, width: int) -> torch.Tensor:
    """Activations (tokens, width)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(48, width, generator=generator)
    if kind == "dead":
        x[:, ::2] = 0
    elif kind == "all dead":
        x.zero_()
    elif kind == "constant":
        x[:, : max(1, width // 2)] = 3.0
    elif kind == "one token over and over":
        x[:] = x[0]
    elif kind == "one token":
        x = x[:1]
    elif kind == "features twice":
        x[:, width // 2 :] = x[:, : width - width // 2]
    elif kind == "one feature far above":
        x[:, 0] *= 1e7
    elif kind == "denormal":
        x *= 1e-40
    elif kind == "tiny":
        x *= 1e-18
    elif kind == "half at its end":
        x = (x.clamp(-1, 1) * LARGEST_HALF).half()
    elif kind == "large":
        x *= 1e15
    return x


def weight(kind: str, rows: int, width: int) -> torch.Tensor:
    """Weights (rows, width)."""
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(5)) * 0.1
    if kind == "all zero":
        w.zero_()
    elif kind == "an empty row and column":
        w[0], w[:, -1] = 0, 0
    elif kind == "all equal":
        w.fill_(0.5)
    elif kind == "denormal":
        w *= 1e-39
    elif kind == "half at its end":
        w = (w * 10).clamp(-1, 1).mul(LARGEST_HALF).half()
    return w


def prune(
    way: tuple[str, dict], x: torch.Tensor, w: torch.Tensor, pattern: Pattern | None = None
) -> tuple[torch.Tensor, LinearRecord]:
    name, chosen = way
    options = MethodOptions(**chosen)
    method = compose(METHODS[name], options)
    pattern = pattern or Pattern(group=METHODS[name].with_options(options).default_group)
    module = nn.Linear(w.shape[1], w.shape[0], bias=False)
    module.weight = nn.Parameter(w.float().clone(), requires_grad=False)
    spec = StatisticsSpec(needs=method.needs, drift="all" if method.needs_drift else "none")
    statistics = InputStatistics(w.shape[1], spec)
    dense = x.float() * 1.01 if method.needs_drift else None
    statistics.add(x, dense)
    work = Work(pattern, 0.5, options)
    finished = prune_linear(method, work, Linear("up_proj", module), NAME, w, statistics)
    return finished.weight, finished.record


X_KINDS = [
    "dead", "all dead", "constant", "one token over and over", "one token", "features twice",
    "one feature far above", "denormal", "tiny", "half at its end", "large",
]  # fmt: skip
W_KINDS = [
    "plain",
    "all zero",
    "an empty row and column",
    "all equal",
    "denormal",
    "half at its end",
]


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("x_kind", X_KINDS)
def test_inputs(way, x_kind):
    for w_kind in W_KINDS:
        for nm in (None, Pattern(2, 4)):
            if nm is not None and way[0] == "wanda-variant":
                continue
            x, w = inputs(x_kind, 16), weight(w_kind, 12, 16)
            try:
                result, record = prune(way, x, w, nm)
            except ValueError as fault:
                # Only an update may leave the range of the stored dtype.
                outside = "half at its end" in w_kind and METHODS[way[0]].updates_weights | (
                    "weight_update" in way[1]
                )
                if not outside or NAME not in str(fault):
                    raise
                continue
            what = (x_kind, w_kind, nm)
            assert result.dtype == w.dtype, what
            assert bool(result.isfinite().all()), what
            zeros = int((result == 0).sum())
            assert record.zeros == zeros, what
            assert zeros >= (0.42 if way[0] == "wanda-variant" else 0.5) * w.numel(), what
            if nm is not None:
                assert int((result.view(12, 4, 4) != 0).sum(-1).max()) <= 2, what
            kept = result != 0
            if not (METHODS[way[0]].updates_weights or "weight_update" in way[1]):
                assert torch.equal(result[kept], w[kept]), what
            if w_kind == "all zero":
                assert zeros == w.numel(), what
            # The result is no worse than no weights at all, unless it aims at the dense model.
            lost = record.relative_output_error
            if lost is not None and "dense_weight" not in way[1]:
                assert lost <= 1.01, what


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_activations_that_are_not_finite_name_the_linear(way, bad):
    x = inputs("plain", 16)
    x[7, 3] = bad
    if compose(METHODS[way[0]], MethodOptions(**way[1])).needs == "none":
        result, _ = prune(way, x, weight("plain", 12, 16))
        assert bool(result.isfinite().all()), "the method does not read activations"
        return
    with pytest.raises(ValueError, match=NAME):
        prune(way, x, weight("plain", 12, 16))


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_products_beyond_float32_name_the_linear(way):
    """Squares are summed in float64; a Gram matrix is float32."""
    x = inputs("plain", 16) * 1e19
    method = compose(METHODS[way[0]], MethodOptions(**way[1]))
    if method.needs == "gram":
        with pytest.raises(ValueError, match=NAME):
            prune(way, x, weight("plain", 12, 16))


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 8), (8, 1), (2, 3)])
def test_the_smallest_linears(way, rows, width):
    for kind in ("plain", "dead", "all dead", "one token"):
        result, record = prune(way, inputs(kind, width), weight("plain", rows, width))
        assert result.shape == (rows, width)
        assert bool(result.isfinite().all())
        assert record.zeros == int((result == 0).sum())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_the_error_of_a_model_that_overflows_in_float16_names_the_linear(method, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.float16)
    tensors = load_file(dense / "model.safetensors")
    for name in ("up_proj", "gate_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] *= 20000
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj are not"):
        prunus.prune(dense, tmp_path / "out", method, calibration=token_ids(), dtype="float16")
    wide = prunus.prune(dense, tmp_path / "wide", method, calibration=token_ids(), dtype="float32")
    assert wide.totals["sparsity"] >= 0.5
