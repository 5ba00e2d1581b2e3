"""A slow and obvious reader and writer of quantised weights, written from the reference page."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from prunus.runtime.description import Description, QuantizedShape
from prunus.runtime.planes import encode
from prunus.runtime.weight import PlaneCode, QuantizedWeight, named_tensors
from safetensors.torch import load_file, save_file


def _zigzag(top: int) -> int:
    return 2 * top - 1 if top > 0 else -2 * top


def _words(symbols: list[int], bits: int) -> list[list[int]]:
    """For each 64 symbols, their planes as 64-bit integers."""
    symbols = symbols + [0] * (-len(symbols) % 64)
    return [
        [
            sum(
                (symbol >> plane & 1) << place for place, symbol in enumerate(symbols[at : at + 64])
            )
            for plane in range(bits)
        ]
        for at in range(0, len(symbols), 64)
    ]


def _class_columns(classes: list[int], index: int) -> list[int | None]:
    columns: list[int | None] = [c for c, own in enumerate(classes) if own == index]
    return columns + [None] * (-len(columns) % 64)


def write_planes(
    levels: list[list[int]], classes: list[int], codes: list[PlaneCode], rows_per_chunk: int
) -> bytes:
    data = b""
    for first in range(0, len(levels), rows_per_chunk):
        for index, (raw, layers) in enumerate(codes):
            columns = _class_columns(classes, index)
            values = [
                0 if column is None else row[column]
                for row in levels[first : first + rows_per_chunk]
                for column in columns
            ]
            offset = 2 ** (raw - 1) if raw else 0
            tops = [(value + offset) // 2**raw for value in values]
            lows = [value + offset - top * 2**raw for value, top in zip(values, tops, strict=True)]
            begin = 0
            for layer, bits in enumerate(layers):
                escape = 2**bits - 1
                symbols = [min(_zigzag(top) - begin, escape) for top in tops]
                if layer == 0:
                    symbols = [
                        symbol if symbol == escape else 2 ** (bits - 1) - 1 - top
                        for symbol, top in zip(symbols, tops, strict=True)
                    ]
                words = _words(symbols, bits)
                if layer == 0:
                    words = [a + b for a, b in zip(words, _words(lows, raw), strict=True)]
                data += b"".join(word.to_bytes(8, "little") for group in words for word in group)
                tops = [top for top, symbol in zip(tops, symbols, strict=True) if symbol == escape]
                begin += escape
            data += bytes(top % 256 for top in tops) + bytes(-len(tops) % 8)
    return data


def read_planes(weight: QuantizedWeight) -> list[list[int]]:
    data, at = bytes(weight.data.tolist()), 0
    classes, (rows, width) = weight.classes.tolist(), weight.shape

    def word() -> int:
        nonlocal at
        at += 8
        return int.from_bytes(data[at - 8 : at], "little")

    levels: list[list[int]] = []
    for first in range(0, rows, weight.rows_per_chunk):
        chunk = [[0] * width for _ in range(min(weight.rows_per_chunk, rows - first))]
        for index, (raw, layers) in enumerate(weight.codes):
            columns = _class_columns(classes, index)
            count = len(chunk) * len(columns)
            lows, found, places, begin = [0] * count, [0] * count, list(range(count)), 0
            for layer, bits in enumerate(layers):
                symbols, low = [], []
                for _ in range(-(-len(places) // 64)):
                    planes = [word() for _ in range(bits)]
                    raw_planes = [word() for _ in range(raw if layer == 0 else 0)]
                    for column in range(64):
                        symbols.append(sum((p >> column & 1) << k for k, p in enumerate(planes)))
                        low.append(sum((p >> column & 1) << k for k, p in enumerate(raw_planes)))
                lows = low if layer == 0 else lows
                rest = []
                for place, symbol in zip(places, symbols, strict=False):
                    if symbol == 2**bits - 1:
                        rest.append(place)
                    elif layer == 0:
                        found[place] = 2 ** (bits - 1) - 1 - symbol
                    else:
                        z = begin + symbol
                        found[place] = (z + 1) // 2 if z % 2 else -z // 2
                places, begin = rest, begin + 2**bits - 1
            for place in places:
                found[place] = data[at] - 256 * (data[at] > 127)
                at += 1
            at += -len(places) % 8
            offset = 2 ** (raw - 1) if raw else 0
            for place, (top, low_bits) in enumerate(zip(found, lows, strict=True)):
                column = columns[place % len(columns)]
                if column is not None:
                    chunk[place // len(columns)][column] = top * 2**raw + low_bits - offset
        levels += chunk
    assert at == len(data)
    return levels


def random_levels(rows: int, columns: int, spread: float, seed: int = 0) -> torch.Tensor:
    """Integers whose size differs from column to column, int8 (rows, columns)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(columns, generator=generator) * 0.7) * spread
    levels = torch.randn(rows, columns, generator=generator) * sizes
    return levels.round().clamp(-127, 127).to(torch.int8)


def quantized_weight(rows: int, columns: int, spread: float = 2, seed: int = 0) -> QuantizedWeight:
    """A random quantised weight of about unit size."""
    generator = torch.Generator().manual_seed(seed)
    steps = 0.5 + torch.rand(columns, generator=generator)
    scales = (0.5 + torch.rand(rows, generator=generator)) / spread
    return encode(random_levels(rows, columns, spread, seed), steps, scales)


def rounded(weight: torch.Tensor) -> QuantizedWeight:
    """A weight rounded to about 15 levels, with a scale per row and a step per column."""
    steps = weight.float().square().mean(0).sqrt().clamp(min=1e-6).bfloat16().float()
    scaled = weight.float() / steps
    scales = (scaled.abs().amax(1) / 7).clamp(min=1e-6).bfloat16().float()
    return encode((scaled / scales[:, None]).round().to(torch.int8), steps, scales)


def quantized_checkpoint(
    source: Path, folder: Path, chosen: Callable[[str], bool] = lambda name: True
) -> Path:
    """Write a dense checkpoint again with the linears of its blocks quantised, and its head or the
    embedding tied to it.
    """
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    entries = {}
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for key, tensor in list(tensors.items()):
            name = key.removesuffix(".weight")
            inside = ".layers." in key or ".h." in key or ".blocks." in key or name == head
            if inside and key.endswith(".weight") and tensor.dim() == 2 and chosen(name):
                weight = rounded(tensors.pop(key))
                tensors |= named_tensors(name, weight)
                entries[name] = QuantizedShape.of(weight).to_json()
        save_file(tensors, shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    packed = Description.of_linears(entries).add_to(config)
    (folder / "config.json").write_text(json.dumps(packed))
    return folder
