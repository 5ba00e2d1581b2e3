"""How long llama.cpp takes for a weight of each type when it decodes, by kind of processor.

The figures are nanoseconds per weight and token, measured by `benchmarks/type_speeds.py` on two
cores with llama-bench: only their ratios matter. They are those of one program and two processors,
so `--fast-on` also takes a file of other measurements, as that script writes it.

GPUs have no table: there decoding waits for memory, so the smallest file is the fastest one, and
`size` alone says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from prunus.formats.gguf.types import TYPES, type_for
from prunus.model.checkpoint.files import read_json
from prunus.rounding.compression_record import CompressionRecord
from prunus.words import did_you_mean

#: Name of a processor's instructions -> type -> nanoseconds per weight.
SPEEDS: dict[str, dict[str, float]] = {
    # Two cores of an AMD EPYC (Zen 4), llama.cpp of llama-cpp-python 0.3.36 built for AVX2 alone.
    # The time of Q2_0 is from an earlier measurement.
    "avx2": {
        "Q4_0": 0.0173, "Q4_1": 0.0333, "Q5_0": 0.0364, "Q5_1": 0.0392, "Q8_0": 0.0372,
        "Q2_K": 0.0182, "Q3_K": 0.0249, "Q4_K": 0.0164, "Q5_K": 0.0282, "Q6_K": 0.0260,
        "IQ4_NL": 0.0175, "IQ4_XS": 0.0258, "IQ2_XXS": 0.0369, "IQ2_XS": 0.0378, "IQ2_S": 0.0364,
        "IQ3_XXS": 0.0514, "IQ3_S": 0.0600, "Q2_0": 0.2492,
    },
    # The same processor, and a build for all that it has.
    "avx512": {
        "Q4_0": 0.0162, "Q4_1": 0.0322, "Q5_0": 0.0330, "Q5_1": 0.0376, "Q8_0": 0.0353,
        "Q2_K": 0.0134, "Q3_K": 0.0237, "Q4_K": 0.0156, "Q5_K": 0.0270, "Q6_K": 0.0238,
        "IQ4_NL": 0.0168, "IQ4_XS": 0.0260, "IQ2_XXS": 0.0373, "IQ2_XS": 0.0359, "IQ2_S": 0.0382,
        "IQ3_XXS": 0.0514, "IQ3_S": 0.0570,
    },
}  # fmt: skip
# The mean of both, for a processor that nobody names.
SPEEDS["cpu"] = {
    kind: (time + SPEEDS["avx512"].get(kind, time)) / 2 for kind, time in SPEEDS["avx2"].items()
}
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
# Nanoseconds per weight of a type that was not measured, so that it is not chosen.
_UNKNOWN = 1e6
#: Files that seem to decode slower than this share of a preset's speed have such a type.
LEAST_SPEED = 0.01
#: The bits per weight of the linears in llama.cpp's Q4_K_M.
Q4_K_M_BITS = 4.81


def speeds_of(name: str) -> dict[str, float]:
    """Type -> nanoseconds per weight, from the table of this name or from a file.

    Args:
        name: A key of `SPEEDS`, or the path of a file that `benchmarks/type_speeds.py` wrote.

    Returns:
        The times of all types of `TYPES`; very long for those that were not measured.

    Raises:
        ValueError: It is neither, it lacks a type of llama.cpp's presets, or a time is not positive
            and finite.
    """
    times = SPEEDS.get(name)
    if times is None:
        try:
            entries = read_json(Path(name))["nanoseconds per weight"]
            times = {kind: float(entry["decode"]) for kind, entry in entries.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`fast_on` must be one of {', '.join(SPEEDS)}, or a file that "
                f"benchmarks/type_speeds.py wrote, not {name}{did_you_mean(name, SPEEDS)}"
            ) from error
        for kind, time in times.items():
            # This leaves out infinity and NaN, and all from which either would follow.
            if not 1 / _UNKNOWN < time < _UNKNOWN:
                raise ValueError(
                    f"{name} says that a weight of {kind} takes {time:g} nanoseconds, which no "
                    "processor does: measure it again with benchmarks/type_speeds.py"
                )
    if missing := sorted({x for shares in _PRESETS for x in shares if x not in times}):
        raise ValueError(f"{name} has no time of {', '.join(missing)}: measure these types too")
    return {kind: times.get(kind, _UNKNOWN) for kind in TYPES}


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
    if recipe.fast_on or recipe.type or size is None or not linears:
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
