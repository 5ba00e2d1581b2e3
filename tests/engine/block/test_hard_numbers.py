"""Extreme numbers for every method: a correct result, or an error that names the linear."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from prunus.engine.block.linear import change_linear
from prunus.engine.linear_record import LinearRecord
from prunus.methods import METHODS, MethodOptions, Work, compose
from prunus.methods.patterns import Pattern
from prunus.methods.statistics import InputStatistics, StatisticsSpec
from prunus.model.linears import Linear
from refusals import assert_refused

NAME = "model.layers.3.mlp.up_proj"
#: Every method alone, and with each kind of option that composes with it.
WAYS = [(name, {}) for name in METHODS if name != "mask"]
WAYS += [
    ("obs", {"mask_from": "magnitude"}),
    ("obs", {"mask_order": "blockwise"}),
    ("alps", {"dense_weight": 0.25}),
    ("sparsegpt", {"damping": 1e-6}),
]
WAYS += [
    ("wanda", {"weight_update": "least-squares"}),
    ("magnitude", {"weight_update": "least-squares"}),
    ("ria", {"weight_update": "least-squares", "damping": 1e-6}),
    ("sparsegpt", {"weight_update": "least-squares"}),
]
IDS = ["-".join([name, *map(str, options.values())]) for name, options in WAYS]
LARGEST_HALF = 65504.0


#: Kind of activations -> what makes them of random ones (tokens, width).
INPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dead": lambda x: x.index_fill(1, torch.arange(0, x.shape[1], 2), 0),
    "all dead": torch.zeros_like,
    "constant": lambda x: x.index_fill(1, torch.arange(max(1, x.shape[1] // 2)), 3.0),
    "one token over and over": lambda x: x[:1].repeat(len(x), 1),
    "one token": lambda x: x[:1],
    "features twice": lambda x: x[:, : x.shape[1] // 2].repeat(1, 2),
    "one feature far above": lambda x: torch.cat([x[:, :1] * 1e7, x[:, 1:]], 1),
    "denormal": lambda x: x * 1e-40,
    "tiny": lambda x: x * 1e-18,
    "half at its end": lambda x: (x.clamp(-1, 1) * LARGEST_HALF).half(),
    "large": lambda x: x * 1e15,
}
#: The same for weights (rows, width).
WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": torch.clone,
    "all zero": torch.zeros_like,
    "an empty row and column": lambda w: torch.nn.functional.pad(w[1:, :-1], (0, 1, 1, 0)),
    "all equal": lambda w: torch.full_like(w, 0.5),
    "denormal": lambda w: w * 1e-39,
    "half at its end": lambda w: (w * 10).clamp(-1, 1).mul(LARGEST_HALF).half(),
}


def inputs(kind: str, width: int) -> torch.Tensor:
    """Activations (tokens, width); those of no kind are ordinary."""
    x = torch.randn(48, width, generator=torch.Generator().manual_seed(3))
    return INPUTS.get(kind, torch.clone)(x)


def weight(kind: str, rows: int, width: int) -> torch.Tensor:
    """Weights (rows, width)."""
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(5)) * 0.1
    return WEIGHTS[kind](w)


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
    finished = change_linear(method, work, Linear("up_proj", module), NAME, w, statistics)
    return finished.weight, finished.record


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("x_kind", INPUTS)
def test_inputs(way, x_kind):
    for w_kind in WEIGHTS:
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
    assert_refused(ValueError, NAME, prune, way, x, weight("plain", 12, 16))


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_products_beyond_float32_name_the_linear(way):
    """Squares are summed in float64; a Gram matrix is float32."""
    x = inputs("plain", 16) * 1e19
    method = compose(METHODS[way[0]], MethodOptions(**way[1]))
    if method.needs == "gram":
        assert_refused(ValueError, NAME, prune, way, x, weight("plain", 12, 16))


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 8), (8, 1), (2, 3)])
def test_the_smallest_linears(way, rows, width):
    for kind in ("plain", "dead", "all dead", "one token"):
        result, record = prune(way, inputs(kind, width), weight("plain", rows, width))
        assert result.shape == (rows, width)
        assert bool(result.isfinite().all())
        assert record.zeros == int((result == 0).sum())
