"""Quantised weights in layered bit planes: encode, check and decode them.

A quantised weight stores integers and scales: `W_ij = scale_i · step_j · q_ij`. The integers are
written as bit planes of groups of 64 columns, in the codes that `plane_codes.py` describes.
`docs/reference/packed-format.md` is the reference of the layout.

    encode                  integers ► bit planes
    check                   damaged data is refused, and what the other functions need is found
    decode_levels, expand   bit planes ► integers, dense weight

With kernels on the CPU, a weight has a second form in memory: its *lines*, which products read
(`kernels/lines.h`). `check` makes them once, when a weight is loaded. Without kernels and on other
devices, this file decodes in torch, from the *offsets* at which the layers of each chunk begin.
Both are what other functions call `prepared`.

Shape suffixes: O output features (rows), I input features (columns), N values, W 64-bit words, P
planes of a word, B its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from prunus.packed.kernels.library import load
from prunus.packed.plane_codes import (
    GROUP,
    MAX_LAYERS,
    MAX_LEVEL,
    MAX_RAW,
    check_parts,
    choose_codes,
    class_order,
    column_histograms,
    default_rows_per_chunk,
    from_zigzag,
    max_level,
    zigzag,
)
from prunus.packed.weight import PlaneCode, QuantizedWeight

# Every int8, in the order of its bits as uint8.
_BYTES = torch.arange(256, dtype=torch.uint8).view(torch.int8).to(torch.int16)
# The zigzag number of the top of every int8, by its bits as uint8, for each number of raw bits.
_ZIGZAGS = [
    zigzag((_BYTES + (1 << raw >> 1)) >> raw).to(torch.uint8).numpy() for raw in range(MAX_RAW + 1)
]
# How many bits of a byte are 1.
_POPCOUNT = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)
# The eight bits of a byte as the eight bytes of a word.
_SPREAD = torch.tensor(
    [[byte >> bit & 1 for bit in range(8)] for byte in range(256)], dtype=torch.uint8
).view(torch.int64)[:, 0]
# The int8 of every zigzag number, by its bits as uint8.
_TOPS = from_zigzag(torch.arange(256, dtype=torch.int16)).to(torch.uint8).numpy()


def encode(
    levels_OI: torch.Tensor,
    steps_I: torch.Tensor,
    scales_O: torch.Tensor,
    classes_I: torch.Tensor | None = None,
    codes: tuple[PlaneCode, ...] = (),
    rows_per_chunk: int | None = None,
) -> QuantizedWeight:
    """Write integers as bit planes.

    Args:
        levels_OI: int8 from -127 to 127, on the CPU, any strides. With raw bits `max_level` is a
            little less.
        steps_I: Floats, rounded to bfloat16.
        scales_O: Floats, rounded to bfloat16.
        classes_I: uint8 (I,): the class of each column. None takes the classes and codes of
            `choose_codes`, which take the fewest bits.
        codes: The code of each class; it does not matter where `classes_I` is None.
        rows_per_chunk: None is `default_rows_per_chunk`.

    Raises:
        ValueError: An argument has another shape or dtype, or a number is out of range.

    >>> levels = torch.tensor([[0, 1, -1, 5], [0, 0, 2, -127]], dtype=torch.int8)
    >>> weight = encode(levels, torch.ones(4), torch.ones(2))
    >>> torch.equal(decode_levels(weight), levels)
    True
    """
    if levels_OI.dtype != torch.int8 or levels_OI.dim() != 2 or not levels_OI.numel():
        raise ValueError(
            f"levels must be an int8 matrix, got {levels_OI.dtype} {tuple(levels_OI.shape)}"
        )
    lowest_I, highest_I = levels_OI.aminmax(dim=0)
    if int(lowest_I.min()) < -MAX_LEVEL:
        raise ValueError(f"levels must lie in -{MAX_LEVEL} to {MAX_LEVEL}, got -128")
    if classes_I is None:
        classes_I, codes = choose_codes(column_histograms(levels_OI))
    rows, columns = levels_OI.shape
    rows_per_chunk = rows_per_chunk or default_rows_per_chunk(columns)
    weight = QuantizedWeight(
        (rows, columns),
        torch.empty(0, dtype=torch.uint8),
        classes_I,
        steps_I.bfloat16(),
        scales_O.bfloat16(),
        tuple(PlaneCode(raw, tuple(layers)) for raw, layers in codes),
        rows_per_chunk,
    )
    check_parts(weight)
    for index, (raw, _) in enumerate(weight.codes):
        highest_of_class = highest_I[classes_I == index]
        largest = int(highest_of_class.max()) if highest_of_class.numel() else 0
        if largest > max_level(raw):
            raise ValueError(
                f"class {index} with {raw} raw bits holds levels up to {max_level(raw)}, "
                f"got {largest}"
            )
    columns_in_order, widths = class_order(weight)
    # Column I is the imaginary column of zeros.
    padded = torch.zeros(min(rows, rows_per_chunk), columns + 1, dtype=torch.int8)
    parts: list[np.ndarray] = []
    for chunk in levels_OI.split(rows_per_chunk):
        padded[: chunk.shape[0], :columns] = chunk
        ordered = padded[: chunk.shape[0]].index_select(1, columns_in_order)
        for levels, code in zip(ordered.split(widths, dim=1), weight.codes, strict=True):
            _encode_values(levels.flatten().numpy().view(np.uint8), code, parts)
    return weight._replace(data=torch.from_numpy(np.concatenate(parts)))


def _encode_values(levels_N: np.ndarray, code: PlaneCode, parts: list[np.ndarray]) -> None:
    """Append the layers and the escape bytes of one class of one chunk to `parts`."""
    raw, layers = code
    if not layers:
        parts.append(levels_N)
        return
    values = _ZIGZAGS[raw][levels_N]
    first = 0
    for index, bits in enumerate(layers):
        named = np.uint8((1 << bits) - 1)
        escaped = values >= named
        symbols = np.minimum(values, named)
        if index == 0:
            # Layer 0 counts from its largest top down to its smallest.
            symbols = np.where(escaped, named, (named >> 1) - _TOPS[symbols])
        planes = _planes(symbols, bits)
        if raw and index == 0:
            low = _planes(levels_N + np.uint8(1 << raw >> 1), raw)
            planes = np.concatenate([planes, low], axis=1)
        parts.append(planes.reshape(-1))
        values = values[escaped] - named
        first += int(named)
    tops = _TOPS[values + np.uint8(first)]
    parts.append(_padded(tops, 8))


def _padded(values: np.ndarray, multiple: int) -> np.ndarray:
    """Bytes with zeros behind them, up to a multiple of some number."""
    missing = -len(values) % multiple
    return np.concatenate([values, np.zeros(missing, np.uint8)]) if missing else values


def _planes(symbols_N: np.ndarray, bits: int) -> np.ndarray:
    """Return planes of the low `bits` bits of symbols, padded with 0: uint8 (W, bits, 8)."""
    symbols_N = _padded(symbols_N, GROUP)
    planes = np.empty((len(symbols_N) // GROUP, bits, 8), dtype=np.uint8)
    for plane in range(bits):
        packed = np.packbits(symbols_N & np.uint8(1 << plane), bitorder="little")
        planes[:, plane] = packed.reshape(-1, 8)
    return planes


def check(weight: QuantizedWeight) -> torch.Tensor:
    """Check that data, classes, codes and scales fit each other; see `forms.check`.

    Returns:
        On the CPU with kernels, the lines, uint8. Otherwise the offsets, int64 (chunks, classes,
        9): where each layer and then the escape bytes begin in `data`; -1 where there is nothing.

    Raises:
        ValueError: They do not fit; the message says what is wrong.
    """
    check_parts(weight)
    if weight.data.dtype != torch.uint8 or weight.data.dim() != 1:
        raise ValueError(
            "the data of a quantised weight must be one row of bytes, "
            f"got {weight.data.dtype} {tuple(weight.data.shape)}"
        )
    host, kernels = _on_host(weight), load()
    offsets = _find_offsets(host)
    if kernels is None:
        for _ in _decoded_chunks(host, offsets, None):
            pass  # decoding checks the levels
    else:
        lines = kernels.lines(host, offsets)
        if weight.data.is_cpu:
            return lines
    return offsets.to(weight.data.device)


def _on_host(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight in contiguous memory of the CPU."""
    parts = ("data", "classes", "steps", "scales")
    return weight._replace(**{name: getattr(weight, name).cpu().contiguous() for name in parts})


def _find_offsets(host: QuantizedWeight) -> torch.Tensor:
    """The offsets of a weight on the CPU, with a check of all lengths and paddings."""
    kernels = load()
    return _scan_all(host) if kernels is None else kernels.plane_offsets(host)


def _refuse_below(lowest: int) -> None:
    """Refuse the level -128, which has no negative in a byte."""
    if lowest < -MAX_LEVEL:
        raise ValueError(f"a quantised weight has the level {lowest}, below -{MAX_LEVEL}")


def _scan_all(weight: QuantizedWeight) -> torch.Tensor:
    """The offsets of a weight, found in torch; see `check` for their shape and errors."""
    _, widths = class_order(weight)
    rows = weight.shape[0]
    begin = 0
    offsets = []
    for first in range(0, rows, weight.rows_per_chunk):
        chunk = min(weight.rows_per_chunk, rows - first)
        for width, code in zip(widths, weight.codes, strict=True):
            begins = _scan(weight.data, begin, chunk * width, code)
            begin = begins.pop()
            offsets.append(begins + [-1] * (MAX_LAYERS + 1 - len(begins)))
    if begin != weight.data.shape[0]:
        raise ValueError(
            f"the planes of a quantised weight end at byte {begin:,} of {weight.data.shape[0]:,}"
        )
    return torch.tensor(offsets, dtype=torch.int64).view(-1, len(weight.codes), MAX_LAYERS + 1)


def _scan(data: torch.Tensor, begin: int, count: int, code: PlaneCode) -> list[int]:
    """Return where the layers and the escape bytes of one class of one chunk begin, and the end."""
    offsets = [begin]
    for index, bits in enumerate(code.layers):
        words = -(-count // GROUP)
        planes = bits + (code.raw if index == 0 else 0)
        _check_length(data, begin, words * planes * 8)
        planes_WPB = data[begin : begin + words * planes * 8].view(words, planes, 8)[:, :bits]
        if count % GROUP:
            last = _symbols(planes_WPB[-1:])[count % GROUP :]
            if bool(last.any()):
                raise ValueError(f"the padding of a layer before byte {begin:,} is not zero")
        # A value escapes where its bits in all planes are 1.
        escapes = planes_WPB[:, 0]
        for plane in range(1, bits):
            escapes = escapes & planes_WPB[:, plane]
        count = int(_POPCOUNT[escapes.int()].sum())
        begin += words * planes * 8
        offsets.append(begin)
    length = -(-count // 8) * 8
    _check_length(data, begin, length)
    if bool(data[begin + count : begin + length].any()):
        raise ValueError(f"the padding of the escape bytes at byte {begin:,} is not zero")
    tops = data[begin : begin + count].view(torch.int8)
    if code.raw and bool(((tops < -(128 >> code.raw)) | (tops > 127 >> code.raw)).any()):
        raise ValueError(f"an escaped value at byte {begin:,} is out of range")
    return [*offsets, begin + length]


def _check_length(data: torch.Tensor, begin: int, length: int) -> None:
    """Check that `length` bytes begin at `begin`."""
    if begin + length > data.shape[0]:
        raise ValueError(
            f"the data of a quantised weight ends at byte {data.shape[0]:,}, but "
            f"{length:,} bytes should begin at byte {begin:,}"
        )


def _symbols(planes_WPB: torch.Tensor) -> torch.Tensor:
    """Return the symbols whose bits planes hold: uint8 (64 · W,)."""
    spread = _SPREAD.to(planes_WPB.device)
    symbols = spread[planes_WPB[:, 0].int()]
    for plane in range(1, planes_WPB.shape[1]):
        symbols |= spread[planes_WPB[:, plane].int()] << plane
    return symbols.view(torch.uint8).flatten()


def decode_levels(weight: QuantizedWeight, prepared: torch.Tensor | None = None) -> torch.Tensor:
    """Return the integers, int8 (O, I): the reference in torch for what the kernels do.

    `prepared` is what `check` returned; only offsets save a second scan.

    Raises:
        ValueError: The data are damaged.
    """
    rows = torch.empty(weight.shape, dtype=torch.int8, device=weight.data.device)
    for first, levels in _decoded_chunks(weight, prepared, None):
        rows[first : first + levels.shape[0]] = levels
    return rows


def _decoded_chunks(
    weight: QuantizedWeight, prepared: torch.Tensor | None, chunks: list[int] | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row and the integers, int8 (rows, I), of some chunks; None takes all."""
    offsets = prepared
    if offsets is None or offsets.dtype != torch.int64:
        offsets = _find_offsets(_on_host(weight))
    rows, columns = weight.shape
    step = weight.rows_per_chunk
    columns_in_order, widths = class_order(weight)
    columns_in_order = columns_in_order.to(weight.data.device)
    starts = offsets.tolist()
    for chunk in range(len(starts)) if chunks is None else chunks:
        count = min(step, rows - chunk * step)
        parts = [
            _decode_values(weight.data, begins, count * width, code).view(count, width)
            for begins, width, code in zip(starts[chunk], widths, weight.codes, strict=True)
        ]
        # The last column takes what belongs to imaginary columns.
        levels = torch.empty(count, columns + 1, dtype=torch.int8, device=weight.data.device)
        levels[:, columns_in_order] = torch.cat(parts, dim=1)
        yield chunk * step, levels[:, :columns]


def _decode_values(
    data: torch.Tensor, begins: list[int], count: int, code: PlaneCode
) -> torch.Tensor:
    """Return the integers of one class of one chunk: int8 (count,).

    Layers are read from the first to the last, each for the values that escaped from the one
    before. Then values are put together from the last layer to the first.
    """
    raw, layers = code
    low = None
    symbols, escapes = [], []
    for index, bits in enumerate(layers):
        words = -(-count // GROUP)
        planes = bits + (raw if index == 0 else 0)
        begin = begins[index]
        planes_WPB = data[begin : begin + words * planes * 8].view(words, planes, 8)
        if raw and index == 0:
            low = _symbols(planes_WPB[:, bits:])
        symbols.append(_symbols(planes_WPB[:, :bits])[:count].to(torch.int16))
        escapes.append(symbols[-1] == (1 << bits) - 1)
        count = int(escapes[-1].sum())
    begin = begins[len(layers)]
    values = data[begin : begin + count].view(torch.int8).to(torch.int16)
    if layers:
        values = zigzag(values)
        first = sum((1 << bits) - 1 for bits in layers)
        for bits, outer, escaped in zip(layers[::-1], symbols[::-1], escapes[::-1], strict=True):
            first -= (1 << bits) - 1
            numbers = outer + first if first else zigzag((1 << (bits - 1)) - 1 - outer)
            values = numbers.masked_scatter_(escaped, values)
        values = from_zigzag(values)
    if low is not None:
        # The kernels hold the sum in a byte.
        values = ((values << raw) + low.to(torch.int16)).to(torch.int8).to(torch.int16)
        values -= 1 << raw >> 1
    _refuse_below(int(values.min()) if values.numel() else 0)
    return values.to(torch.int8)


def expand(
    weight: QuantizedWeight,
    dtype: torch.dtype | None = None,
    prepared: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the dense weight (O, I), by default in bfloat16; see `forms.expand`.

    The product of an integer, a step and a scale has at most 24 significant bits, so it is exact
    in float32 and rounded once to `dtype`.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype or torch.bfloat16, device=weight.data.device)
    kernels = load() if weight.data.is_cpu else None
    if kernels is not None:
        kernels.expand(weight, check(weight) if prepared is None else prepared, out)
        return out
    steps = weight.steps.float()
    for first, levels in _decoded_chunks(weight, prepared, None):
        rows = slice(first, first + levels.shape[0])
        out[rows] = (levels * steps).mul_(weight.scales[rows, None])
    return out


def expand_rows(
    weight: QuantizedWeight, rows: torch.Tensor, prepared: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return some rows of the dense weight: (..., I); see `forms.expand_rows`."""
    numbers = rows.flatten().to(torch.int64)
    count = weight.shape[0]
    if bool(((numbers < 0) | (numbers >= count)).any()):
        raise IndexError(f"row numbers must lie in 0 to {count - 1}")
    out = torch.empty(numbers.shape[0], weight.shape[1], dtype=dtype, device=weight.data.device)
    kernels = load() if weight.data.is_cpu else None
    if kernels is not None:
        if numbers.shape[0]:
            prepared = check(weight) if prepared is None else prepared
            kernels.expand_rows(weight, prepared, numbers, out)
        return out.view(*rows.shape, weight.shape[1])
    chunks = numbers // weight.rows_per_chunk
    steps = weight.steps.float()
    for first, levels in _decoded_chunks(weight, prepared, chunks.unique().tolist()):
        at = (chunks == first // weight.rows_per_chunk).nonzero().flatten()
        taken = levels[numbers[at] - first]
        out[at] = (taken * steps).mul_(weight.scales[numbers[at], None]).to(dtype)
    return out.view(*rows.shape, weight.shape[1])
