"""Quantised weights in layered bit planes: encode, check and decode them.

A quantised weight stores integers and scales: `W_ij = scale_i · step_j · q_ij`. The integers are
written as bit planes of groups of 64 columns, in the codes that `plane_codes.py` describes.
`docs/reference/packed-format.md` is the reference of the layout.

    encode                  integers ► bit planes
    check                   refuse damaged data, and make what the other functions need
    decode_levels, expand   bit planes ► integers, dense weight

With kernels on the CPU, a weight has a second form in memory: its *lines*, which products read
(`kernels/lines.h`). `check` makes them once, when a weight is loaded. Without kernels and on other
devices, this file decodes in torch, and `check` finds the bytes at which the chunks begin. Both are
what other functions call `prepared`.

Shape suffixes: O output features (rows), I input features (columns), N values, W 64-bit words, P
planes of a word, B its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from prunus.runtime.kernels.library import load
from prunus.runtime.plane_codes import (
    GROUP,
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
from prunus.runtime.weight import PlaneCode, QuantizedWeight

# Every int8, in the order of its bits as uint8.
_BYTES = torch.arange(256, dtype=torch.uint8).view(torch.int8).to(torch.int16)
# The zigzag number of the top of every int8, by its bits as uint8, for each number of raw bits.
_ZIGZAGS = [
    zigzag((_BYTES + (1 << raw >> 1)) >> raw).to(torch.uint8).numpy() for raw in range(MAX_RAW + 1)
]
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
        On the CPU with kernels, the lines, uint8. Otherwise int64 (chunks,): the byte of `data` at
        which each chunk begins.

    Raises:
        ValueError: They do not fit; the message says what is wrong.
    """
    check_parts(weight)
    if weight.data.dtype != torch.uint8 or weight.data.dim() != 1:
        raise ValueError(
            "the data of a quantised weight must be one row of bytes, "
            f"got {weight.data.dtype} {tuple(weight.data.shape)}"
        )
    # The scan reads contiguous memory of the CPU.
    parts = ("data", "classes", "steps", "scales")
    host = weight._replace(**{name: getattr(weight, name).cpu().contiguous() for name in parts})
    kernels = load()
    if kernels is None:
        begins = torch.tensor([begin for _, begin, _ in _decoded_chunks(host)])
        return begins.to(weight.data.device)
    lines, offsets = kernels.lines(host)
    return lines if weight.data.is_cpu else offsets[:, 0, 0].to(weight.data.device)


def _symbols(planes_WPB: torch.Tensor) -> torch.Tensor:
    """Return the symbols whose bits planes hold: uint8 (64 · W,)."""
    spread = _SPREAD.to(planes_WPB.device)
    symbols = spread[planes_WPB[:, 0].int()]
    for plane in range(1, planes_WPB.shape[1]):
        symbols |= spread[planes_WPB[:, plane].int()] << plane
    return symbols.view(torch.uint8).flatten()


def decode_levels(weight: QuantizedWeight) -> torch.Tensor:
    """Return the integers, int8 (O, I): the reference in torch for what the kernels do.

    Raises:
        ValueError: The data are damaged.
    """
    rows = torch.empty(weight.shape, dtype=torch.int8, device=weight.data.device)
    for first, _, levels in _decoded_chunks(weight):
        rows[first : first + levels.shape[0]] = levels
    return rows


def _decoded_chunks(weight: QuantizedWeight) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield the first row, the first byte and the integers, int8 (rows, I), of every chunk.

    Raises:
        ValueError: The data are damaged.
    """
    order = class_order(weight)
    begin = 0
    for first in range(0, weight.shape[0], weight.rows_per_chunk):
        levels, end = _decode_chunk(weight, order, first, begin)
        yield first, begin, levels
        begin = end
    if begin != weight.data.shape[0]:
        raise ValueError(
            f"the planes of a quantised weight end at byte {begin:,} of {weight.data.shape[0]:,}"
        )


def _decode_chunk(
    weight: QuantizedWeight, order: tuple[torch.Tensor, list[int]], first: int, begin: int
) -> tuple[torch.Tensor, int]:
    """Return the integers of the chunk that has row `first`, int8 (rows, I), and its end in `data`.

    `order` is that of `class_order`, and `begin` is where the chunk begins in `data`.
    """
    columns_in_order, widths = order
    rows = min(weight.rows_per_chunk, weight.shape[0] - first)
    parts = []
    for width, code in zip(widths, weight.codes, strict=True):
        values, begin = _decode_values(weight.data, begin, rows * width, code)
        parts.append(values.view(rows, width))
    # The last column takes what belongs to imaginary columns.
    levels = torch.empty(rows, weight.shape[1] + 1, dtype=torch.int8, device=weight.data.device)
    levels[:, columns_in_order.to(weight.data.device)] = torch.cat(parts, dim=1)
    return levels[:, :-1], begin


def _decode_values(
    data: torch.Tensor, begin: int, count: int, code: PlaneCode
) -> tuple[torch.Tensor, int]:
    """Return the integers of one class of one chunk, int8 (count,), and where its bytes end.

    Layers are read from the first to the last, each for the values that escaped from the one
    before. Then values are put together from the last layer to the first.
    """
    low = None
    layers = []
    for index, bits in enumerate(code.layers):
        raw = code.raw if index == 0 else 0
        words = -(-count // GROUP)
        planes_WPB = _part(data, begin, words * (bits + raw) * 8).view(words, bits + raw, 8)
        symbols = _symbols(planes_WPB[:, :bits])
        if bool(symbols[count:].any()):
            raise ValueError(f"the padding of a layer at byte {begin:,} is not zero")
        if raw:
            low = _symbols(planes_WPB[:, bits:])
        layers.append(symbols[:count].to(torch.int16))
        count = int((layers[-1] == (1 << bits) - 1).sum())
        begin += planes_WPB.numel()
    escaped = _part(data, begin, -(-count // 8) * 8).view(torch.int8)
    if bool(escaped[count:].any()):
        raise ValueError(f"the padding of the escape bytes at byte {begin:,} is not zero")
    if code.raw and bool(((escaped < -(128 >> code.raw)) | (escaped > 127 >> code.raw)).any()):
        raise ValueError(f"an escaped value at byte {begin:,} is out of range")
    values = _joined(layers, escaped[:count].to(torch.int16), code)
    if low is not None:
        # The kernels hold the sum in a byte.
        values = ((values << code.raw) + low.to(torch.int16)).to(torch.int8).to(torch.int16)
        values -= 1 << code.raw >> 1
    lowest = int(values.min()) if values.numel() else 0
    if lowest < -MAX_LEVEL:  # -128 has no negative in a byte
        raise ValueError(f"a quantised weight has the level {lowest}, below -{MAX_LEVEL}")
    return values.to(torch.int8), begin + escaped.numel()


def _part(data: torch.Tensor, begin: int, length: int) -> torch.Tensor:
    """Return `length` bytes of the data, after a check that they are there."""
    if begin + length > data.shape[0]:
        raise ValueError(
            f"the data of a quantised weight ends at byte {data.shape[0]:,}, but "
            f"{length:,} bytes should begin at byte {begin:,}"
        )
    return data[begin : begin + length]


def _joined(layers: list[torch.Tensor], tops: torch.Tensor, code: PlaneCode) -> torch.Tensor:
    """Return the tops of all values of a class, int16: those that layers name, and escaped ones.

    Args:
        layers: The symbols of each layer, int16.
        tops: The escaped tops, int16.
        code: The code of the class.
    """
    if not layers:
        return tops
    values = zigzag(tops)
    first = sum((1 << bits) - 1 for bits in code.layers)
    for bits, symbols in zip(reversed(code.layers), reversed(layers), strict=True):
        named = (1 << bits) - 1
        first -= named
        numbers = symbols + first if first else zigzag((named >> 1) - symbols)
        values = numbers.masked_scatter_(symbols == named, values)
    return from_zigzag(values)


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
    for first, _, levels in _decoded_chunks(weight):
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
    if not numbers.shape[0]:
        return out.view(*rows.shape, weight.shape[1])
    if prepared is None:
        prepared = check(weight)
    kernels = load() if weight.data.is_cpu else None
    if kernels is not None:
        kernels.expand_rows(weight, prepared, numbers, out)
        return out.view(*rows.shape, weight.shape[1])
    chunks = numbers // weight.rows_per_chunk
    order = class_order(weight)
    steps = weight.steps.float()
    for chunk in chunks.unique().tolist():
        first = chunk * weight.rows_per_chunk
        levels, _ = _decode_chunk(weight, order, first, int(prepared[chunk]))
        at = (chunks == chunk).nonzero().flatten()
        taken = levels[numbers[at] - first]
        out[at] = (taken * steps).mul_(weight.scales[numbers[at], None]).to(dtype)
    return out.view(*rows.shape, weight.shape[1])
