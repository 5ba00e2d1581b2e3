"""Codes for quantised weights: how many bits every integer takes, and which code takes the fewest.

A code is a chain of layers of bit planes. Layer l gives b_l bits to each value that reaches it.
These bits name one of the 2^b_l - 1 next integers in the order 0, +1, -1, +2, -2, ..., or they say
that the value is none of them and continues in the next layer. Values that no layer names take
a byte at the end. The `raw` lowest bits of every value may be stored as they are, before the chain.
`docs/reference/packed-format.md` is the reference.

Columns whose integers need different numbers of bits go into different classes, each of which has
a code of its own.

The *zigzag number* of an integer is its position in the order above. The *top* of a value is what
is left of it without its raw bits.

    check_code, check_parts                         what a file may declare
    zigzag, class_order                             the order of integers, and of columns
    code_lengths                                    what a code costs per value
    column_histograms, choose_codes                 the search for classes and codes

Shape suffixes: I input features (columns), V the 255 values -127 to 127, Z zigzag numbers, R runs
of columns, N runs times numbers of raw bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from prunus.runtime.weight import PlaneCode, QuantizedWeight, require

#: Bits a weight that one processor cycle for 64 weights counts when codes are chosen, because
#: layers take time. This price gives up about 0.01 bits for a fifth of the time.
CYCLE_PRICE = 0.02
#: Columns of one group: a plane of a group is one 64-bit word.
GROUP = 64
#: Integers lie in [-MAX_LEVEL, MAX_LEVEL].
MAX_LEVEL = 127
#: A weight has at most this many classes of columns.
MAX_CLASSES = 4
#: A code has at most this many layers.
MAX_LAYERS = 8
#: A layer gives at most this many bits to a value.
MAX_LAYER_BITS = 4
#: A value has at most this many raw bits.
MAX_RAW = 3
#: Weights of one chunk, about: what a kernel decodes of it stays in the first-level cache.
CHUNK_WEIGHTS = 32768
#: Rows and columns of a weight: far above any real model, and small enough that a product of two
#: such numbers fits in 64 bits.
MAX_FEATURES = 2**31
# Bits at the end for a value that no layer names.
_ESCAPE_BITS = 8
# What a class more must save at least: its entry in config.json, and the kernels' work for it.
_CLASS_BITS = 1024
# There are this many zigzag numbers: those of all int8.
_ZIGZAGS = 256
# The search considers at most this many boundaries between classes.
_MAX_UNITS = 40
# Chains that are searched for at a time: what is computed for them stays in the cache.
_CHAINS = 512


def check_code(code: PlaneCode) -> None:
    """Check the numbers of a code.

    Raises:
        ValueError: One is out of range; the message says which.
    """
    raw, layers = code
    if not 0 <= raw <= MAX_RAW or (raw and not layers):
        raise ValueError(
            f"a code has 0 to {MAX_RAW} raw bits, and none without layers; "
            f"got {raw} and {len(layers)} layers"
        )
    if len(layers) > MAX_LAYERS or not all(1 <= bits <= MAX_LAYER_BITS for bits in layers):
        raise ValueError(
            f"a code has at most {MAX_LAYERS} layers of 1 to {MAX_LAYER_BITS} bits, got {layers}"
        )


def check_parts(weight: QuantizedWeight) -> None:
    """Check everything but the data: shapes, dtypes, classes, codes, steps and scales.

    Raises:
        ValueError: They do not fit; the message says what is wrong.
    """
    rows, columns = weight.shape
    if not (0 < rows < MAX_FEATURES and 0 < columns < MAX_FEATURES):
        raise ValueError(f"a quantised weight cannot have {rows} x {columns} entries")
    if not 0 < weight.rows_per_chunk < MAX_FEATURES:
        raise ValueError(f"rows_per_chunk must be at least 1, got {weight.rows_per_chunk}")
    if not 1 <= len(weight.codes) <= MAX_CLASSES:
        raise ValueError(f"a quantised weight has 1 to {MAX_CLASSES} codes, got {weight.codes}")
    for code in weight.codes:
        check_code(code)
    of_weight = f"of a quantised weight of {rows} x {columns}"
    require(f"classes {of_weight}", weight.classes, torch.uint8, columns)
    for name, part, length in (("steps", weight.steps, columns), ("scales", weight.scales, rows)):
        require(f"{name} {of_weight}", part, torch.bfloat16, length)
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"one of the {name} of a quantised weight is not a finite number")
    if int(weight.classes.max()) >= len(weight.codes):
        raise ValueError(
            f"a column is in class {int(weight.classes.max())}, "
            f"but there are {len(weight.codes)} codes"
        )


def default_rows_per_chunk(in_features: int) -> int:
    """Return the rows of one chunk: as many as make about 32,768 weights, at least one.

    >>> default_rows_per_chunk(1536)
    21
    """
    return max(1, CHUNK_WEIGHTS // in_features)


def max_level(raw: int) -> int:
    """Return the largest integer of a class with `raw` raw bits.

    The kernels work with the integer plus half of what the raw bits count, and one byte holds it.

    >>> max_level(0), max_level(2)
    (127, 125)
    """
    return MAX_LEVEL - (1 << raw >> 1)


def zigzag(tops: torch.Tensor) -> torch.Tensor:
    """Return the positions of signed integers in the order 0, +1, -1, +2, -2, ...

    `tops` are int16, int32 or int64, of a magnitude below 2^14. The result has their dtype.

    >>> zigzag(torch.tensor([0, 1, -1, 2, -2])).tolist()
    [0, 1, 2, 3, 4]
    """
    return (tops * -2) ^ (-tops >> 15)


def from_zigzag(zigzags: torch.Tensor) -> torch.Tensor:
    """Return the integers at positions of `zigzag`.

    >>> from_zigzag(torch.tensor([0, 1, 2, 3, 4])).tolist()
    [0, 1, -1, 2, -2]
    """
    return -((zigzags >> 1) ^ -(zigzags & 1))


def _zigzags(raw: int) -> torch.Tensor:
    """Return the zigzag number of the top of every value: int64 (V,)."""
    values = torch.arange(-MAX_LEVEL, MAX_LEVEL + 1)
    return zigzag((values + (1 << raw >> 1)) >> raw)


def class_order(weight: QuantizedWeight) -> tuple[torch.Tensor, list[int]]:
    """Return the columns in the order in which they are stored, and how many each class has.

    The columns of a class follow each other, and imaginary columns, numbered I, fill up its last
    group of 64. The widths of the classes count them too.
    """
    columns = weight.shape[1]
    by_class, widths = [], []
    for index in range(len(weight.codes)):
        members = (weight.classes.cpu() == index).nonzero().flatten()
        widths.append(-(-members.shape[0] // GROUP) * GROUP)
        padding = widths[-1] - members.shape[0]
        by_class.append(torch.nn.functional.pad(members, (0, padding), value=columns))
    return torch.cat(by_class), widths


def code_lengths(code: PlaneCode) -> torch.Tensor:
    """Return the bits that a code takes for every value from -127 to 127: float32 (255,).

    The padding of layers to whole words is not counted.

    >>> code_lengths(PlaneCode(0, (2, 1)))[125:130].tolist()  # -2, -1, 0, 1, 2
    [11.0, 2.0, 2.0, 2.0, 3.0]
    """
    check_code(code)
    bits_Z = torch.full((_ZIGZAGS,), float(code.raw + sum(code.layers) + _ESCAPE_BITS))
    first, bits = 0, code.raw
    for layer in code.layers:
        bits += layer
        bits_Z[first : first + (1 << layer) - 1] = bits
        first += (1 << layer) - 1
    return bits_Z[_zigzags(code.raw)]


def column_histograms(levels_OI: torch.Tensor) -> torch.Tensor:
    """Count how often each column has each value from -127 to 127: int64 (I, 255).

    `levels_OI` is int8, without -128.

    >>> column_histograms(torch.tensor([[0, 1], [0, -1]], dtype=torch.int8))[:, 126:129].tolist()
    [[0, 2, 0], [1, 0, 1]]
    """
    columns = levels_OI.shape[1]
    width = 2 * MAX_LEVEL + 1
    counts = torch.zeros(columns * width, dtype=torch.int64)
    firsts = torch.arange(columns, dtype=torch.int32) * width + MAX_LEVEL
    for part in levels_OI.split(max(1, (1 << 20) // columns)):
        counts += torch.bincount((part + firsts).flatten(), minlength=counts.shape[0])
    return counts.view(columns, width)


def choose_codes(
    histograms_IV: torch.Tensor,
) -> tuple[torch.Tensor, tuple[PlaneCode, ...]]:
    """Divide columns into up to 4 classes, uint8 (I,), and choose codes that take the fewest bits.

    Columns are sorted by the bits they need. Classes are runs of whole groups in this order, and
    dynamic programming finds the best boundaries and the best chain of every run. The padding of
    layers to whole words is part of the cost, so a small weight gets fewer layers and classes.

    Args:
        histograms_IV: Integers or floats (I, 255): how often column i has the value v - 127. All
            rows have the same sum, the number of output features.

    Returns:
        Classes, uint8 (I,), and the code of each class.

    Raises:
        ValueError: The histograms have another shape.

    >>> histograms = torch.zeros(128, 255)
    >>> histograms[:, 127] = 512
    >>> choose_codes(histograms)[1]
    (PlaneCode(raw=0, layers=(1,)),)
    """
    if histograms_IV.dim() != 2 or histograms_IV.shape[1] != 2 * MAX_LEVEL + 1:
        raise ValueError(f"histograms must be (columns, 255), got {tuple(histograms_IV.shape)}")
    columns = histograms_IV.shape[0]
    histograms_IV = histograms_IV.double()
    rows = float(histograms_IV[0].sum())
    chunks = max(1.0, rows / default_rows_per_chunk(columns))
    order = _rates(histograms_IV).argsort(stable=True)
    groups = -(-columns // GROUP)
    # Imaginary columns of zeros fill up the first group, where zeros take the fewest bits.
    sums = torch.zeros(groups, histograms_IV.shape[1], dtype=torch.float64)
    padding = groups * GROUP - columns
    sums[0, MAX_LEVEL] = padding * rows
    sums.index_add_(0, (torch.arange(columns) + padding) // GROUP, histograms_IV[order])
    units = min(groups, _MAX_UNITS)
    ends = torch.tensor([groups * (unit + 1) // units for unit in range(units)])
    totals = torch.cat([torch.zeros_like(sums[:1]), sums.cumsum(0)[ends - 1]])
    firsts, lasts = torch.triu_indices(units, units)
    costs, codes = _best_codes(totals[lasts + 1] - totals[firsts], chunks)
    number = torch.full((units, units), -1)
    number[firsts, lasts] = torch.arange(firsts.shape[0])
    by_run = torch.full((units, units), float("inf"), dtype=torch.float64)
    by_run[firsts, lasts] = costs
    runs = _best_runs(by_run.tolist(), MAX_CLASSES)
    classes = torch.empty(columns, dtype=torch.uint8)
    for index, (first, last) in enumerate(runs):
        begin = 0 if first == 0 else int(ends[first - 1]) * GROUP - padding
        classes[order[begin : int(ends[last]) * GROUP - padding]] = index
    return classes, tuple(codes(int(number[first, last])) for first, last in runs)


def _rates(histograms_IV: torch.Tensor) -> torch.Tensor:
    """Return about how many bits each column needs, for sorting: (I,)."""
    magnitudes = torch.arange(-MAX_LEVEL, MAX_LEVEL + 1, dtype=torch.float64).abs()
    return histograms_IV @ (1 + 2 * magnitudes).log2()


def _best_codes(
    histograms_RV: torch.Tensor, chunks: float
) -> tuple[torch.Tensor, Callable[[int], PlaneCode]]:
    """The best code of each histogram (R, 255), by dynamic programming over its chain.

    Returns:
        The costs in bits (R,), and a function from the number of a histogram to its code.
    """
    count = len(histograms_RV)
    raws = range(MAX_RAW + 1)
    # Row w * R + r is histogram r with w raw bits in front.
    tops_NZ = histograms_RV.new_zeros(len(raws) * count, _ZIGZAGS)
    for raw, part_RZ in zip(raws, tops_NZ.split(count), strict=True):
        part_RZ.index_add_(1, _zigzags(raw), histograms_RV)
    # How many values have at least this zigzag number, and so reach a layer that begins with it.
    reaching_NZ = tops_NZ.flip(1).cumsum(1).flip(1)
    raws_N = torch.arange(len(raws)).repeat_interleave(count)
    chains = [
        _best_chains(*part, chunks)
        for part in zip(reaching_NZ.split(_CHAINS), raws_N.split(_CHAINS), strict=True)
    ]
    chosen = [torch.cat(layer) for layer in zip(*(layers for _, layers in chains), strict=True)]
    costs_WR = (torch.cat([cost for cost, _ in chains]) + raws_N * reaching_NZ[:, 0]).view(
        -1, count
    )
    for raw, cost_R in zip(raws, costs_WR, strict=True):
        too_large_R = histograms_RV[:, MAX_LEVEL + max_level(raw) + 1 :].sum(1) > 0
        cost_R.masked_fill_(too_large_R, float("inf"))
    best_R, raw_R = costs_WR.min(0)

    def code(number: int) -> PlaneCode:
        raw = int(raw_R[number])
        layers, first = [], 0
        for bits_NZ in chosen:
            bits = int(bits_NZ[raw * count + number, first])
            if bits == 0:
                break
            layers.append(bits)
            first += (1 << bits) - 1
        return PlaneCode(raw, tuple(layers))

    return best_R, code


def _best_chains(
    reaching_NZ: torch.Tensor, raws_N: torch.Tensor, chunks: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The cost of the best chain (N,) and, per layer, the bits chosen (N, Z); 0 ends it.

    The state of the search is the zigzag number with which a layer begins. It runs from the last
    layer to the first.

    Args:
        reaching_NZ: How many values have at least this zigzag number.
        raws_N: Raw bits in front of a chain, which then has at least one layer.
        chunks: Number of chunks, each of which pads its layers.
    """
    ended_NZ = _ESCAPE_BITS * _with_padding(reaching_NZ, chunks, 8)
    padded_NZ = _with_padding(reaching_NZ, chunks, GROUP)
    # Beyond the last zigzag number there is no value, and nothing to pay.
    beyond_NB = ended_NZ.new_zeros(len(ended_NZ), (1 << MAX_LAYER_BITS) - 1)
    after_NZ = ended_NZ
    chosen = []
    for layer in reversed(range(MAX_LAYERS)):
        # The first layer holds whole groups anyway.
        values_NZ = padded_NZ if layer else reaching_NZ
        longer_NZ = torch.cat([after_NZ, beyond_NB], dim=1)
        needed_N = (raws_N > 0) & (layer == 0)
        ways = [ended_NZ.masked_fill(needed_N[:, None], float("inf"))]
        for bits in range(1, MAX_LAYER_BITS + 1):
            named = (1 << bits) - 1
            rest_NZ = longer_NZ[:, named : named + _ZIGZAGS]
            price = bits + CYCLE_PRICE * _cycles(layer, bits, raws_N)
            ways.append(price * values_NZ + rest_NZ)
        after_NZ, best_NZ = torch.stack(ways).min(0)
        chosen.append(best_NZ)
    return after_NZ[:, 0], chosen[::-1]


def _cycles(layer: int, bits: int, raws_N: torch.Tensor) -> float | torch.Tensor:
    """Cycles to decode 64 values of a layer, for one token, on AMD's Zen 4 with AVX-512."""
    if layer == 0 and bits == 1:
        by_raw = torch.tensor((3.8, 3.8, 5.1, 5.1), dtype=torch.float64)
        return by_raw[raws_N, None]
    if layer == 0:
        return 5.1
    return 3.5 if bits == 1 else 5.0


def _with_padding(counts: torch.Tensor, chunks: float, multiple: int) -> torch.Tensor:
    """Return how many places `counts` values take, about, if every chunk fills up a multiple."""
    mean = counts / chunks
    some = 1 - torch.exp(-mean)  # share of chunks that have any
    return chunks * torch.maximum(multiple * some, mean + (multiple - 1) / 2 * some)


def _best_runs(costs: list[list[float]], max_runs: int) -> list[tuple[int, int]]:
    """Divide units into at most `max_runs` runs of the lowest total of `costs[first][last]`.

    Returns:
        (first, last) of every run, in order.

    >>> _best_runs([[1.0, 9000.0], [0.0, 1.0]], max_runs=2)
    [(0, 0), (1, 1)]
    """
    units = len(costs)
    best = [(costs[0][last], [(0, last)]) for last in range(units)]
    for _ in range(max_runs - 1):
        longer = [
            [
                (cost + costs[middle + 1][last] + _CLASS_BITS, [*runs, (middle + 1, last)])
                for middle, (cost, runs) in enumerate(best[:last])
            ]
            for last in range(units)
        ]
        best = [min([best[last], *longer[last]]) for last in range(units)]
    return best[-1][1]
