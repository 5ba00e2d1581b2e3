"""How long llama.cpp takes for a weight of each type when it decodes, by kind of processor.

The figures of `llama_cpp.SPEEDS` are nanoseconds per weight and token, measured by
`benchmarks/type_speeds.py` on two cores with llama-bench: only their ratios matter. They are those
of one program and two processors, so `--fast-on` also takes a file of other measurements, as that
script writes it.

GPUs have no table: there decoding waits for memory, so the smallest file is the fastest one, and
`size` alone says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from prunus.formats.gguf.types import TYPES, type_for
from prunus.rounding.compression_record import CompressionRecord
from prunus.rounding.llama_cpp import UNKNOWN, times_of

# What the linears of llama.cpp's presets consist of, from IQ2_XS, IQ2_M, Q2_K, Q3_K_M, Q4_K_M and
# Q5_K_M to Q8_0: type -> share of the weights, as seen in files of Llamas. Q2_K has a little more
# of Q3_K; so a file of its size is not taken for one between it and IQ2_M, which is slow.
_PRESETS = (
    {"IQ2_XS": 1.0},
    {"IQ2_S": 0.85, "IQ3_S": 0.15},
    {"Q2_K": 0.7, "Q3_K": 0.3},
    {"Q3_K": 0.62, "Q4_K": 0.38},
    {"Q4_K": 0.85, "Q6_K": 0.15},
    {"Q5_K": 0.85, "Q6_K": 0.15},
    {"Q6_K": 1.0},
    {"Q8_0": 1.0},
)
#: Files that seem to decode slower than this share of a preset's speed have such a type.
LEAST_SPEED = 0.01
#: The bits per weight of the linears in llama.cpp's Q4_K_M.
Q4_K_M_BITS = 4.81


def speeds_of(name: str) -> dict[str, float]:
    """Type -> nanoseconds per weight, from the table of this name or from a file.

    Args:
        name: As for `times_of`.

    Returns:
        The times of all types of `TYPES`; very long for those that were not measured.

    Raises:
        ValueError: As `times_of`, or a type of llama.cpp's presets is missing.
    """
    times = times_of(name)
    if missing := sorted({x for shares in _PRESETS for x in shares if x not in times}):
        raise ValueError(f"{name} has no time of {', '.join(missing)}: measure these types too")
    return {kind: times.get(kind, UNKNOWN) for kind in TYPES}


def preset_time(times: Mapping[str, float], bits: float, columns: int) -> float:
    """Nanoseconds per weight of the linears in a preset of llama.cpp, of any size.

    Between two presets it is what a mix of both takes.

    Args:
        times: Type -> nanoseconds per weight.
        bits: Bits per weight of the linears, with their scales.
        columns: The width of the weight. Where 256 does not divide it, llama.cpp takes other types.

    >>> times = dict.fromkeys(TYPES, 0.4) | {"Q4_K": 0.2}
    >>> round(preset_time(times, Q4_K_M_BITS, 512), 3), round(preset_time(times, 9.0, 512), 3)
    (0.23, 0.4)
    """
    presets = [
        [(type_for(kind, columns), share) for kind, share in shares.items()] for shares in _PRESETS
    ]
    return float(
        np.interp(
            bits,
            [sum(kind.bits * share for kind, share in preset) for preset in presets],
            [sum(times[kind.name] * share for kind, share in preset) for preset in presets],
        )
    )


def advice(record: CompressionRecord) -> str:
    """A sentence that offers `--fast-on` if processors decode the types of a file slowly.

    They are slow if its linears take more than 1.05 times as long as those of llama.cpp's preset of
    this size. A preset has all that is not in a block in `Q6_K`. Empty if the types are not slow,
    or if the user chose them or their speed.
    """
    recipe, size, times = record.recipe, record.size, speeds_of("cpu")
    linears = [
        (times[record.types[f"{block.name}.{name}"]], math.prod(linear.shape), linear.shape[-1])
        for block in record.blocks
        for name, linear in block.linears.items()
    ]
    if recipe.fast_on or recipe.gives_types or size is None or not linears:
        return ""
    weights = sum(count for _, count, _ in linears)
    bits = (8 * size.after - TYPES["Q6_K"].bits * (size.parameters - weights)) / weights
    preset = sum(preset_time(times, bits, columns) * count for _, count, columns in linears)
    speed = preset / sum(time * count for time, count, _ in linears)
    if not LEAST_SPEED < speed <= 1 / 1.05:
        return ""
    return (
        f"Processors decode this file at about {speed:.1f} of the speed of llama.cpp's file of "
        "this size; with --fast-on cpu it would be as fast, and lose more. On GPUs it is fast.\n"
    )
