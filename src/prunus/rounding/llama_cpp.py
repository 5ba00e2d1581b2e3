"""Names and figures of llama.cpp's types and presets. Imports no torch.

Options are checked by these tables before anything else is imported.
"""

from __future__ import annotations

import re
from pathlib import Path

from prunus.model.checkpoint.files import read_json
from prunus.words import did_you_mean

#: Preset of llama-quantize -> the type that most of its matrices have. Each type that prunus writes
#: is that of a preset. Presets of fewer bits than any of these types are not here.
PRESETS = {
    "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1", "Q8_0": "Q8_0",
    "Q2_K_S": "Q2_K", "Q2_K": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K",
    "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS", "MXFP4_MOE": "MXFP4", "Q2_0": "Q2_0",
    "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S",
    "IQ3_XXS": "IQ3_XXS", "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S",
}  # fmt: skip
#: What llama-quantize takes these names for.
SHORT = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
#: The types of GGUF that prunus writes, by name.
TYPE_NAMES = tuple(dict.fromkeys(PRESETS.values()))

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
# Nanoseconds per weight of a type that was not measured, so that it is not chosen.
UNKNOWN = 1e6
# Whether a name looks like that of a preset.
_PRESET = re.compile(r"(UD-)?(I?Q|TQ)[1-8]_(K_)?(XXS|XS|S|M|L|XL|0)", re.IGNORECASE).fullmatch


def preset_named(text: str) -> str | None:
    """The preset of llama-quantize that a text names, whatever its case; None for no preset.

    Raises:
        ValueError: The name is that of a preset whose size is not known.

    >>> preset_named("q4_k"), preset_named("900MB")
    ('Q4_K_M', None)
    """
    name = text.strip().upper()
    name = SHORT.get(name, name)
    if name not in PRESETS and _PRESET(name):
        raise ValueError(
            f"the size of {text[:40]} is not known: give one of {', '.join(PRESETS)}, or a size "
            "such as 900MB"
        )
    return name if name in PRESETS else None


def check_type(name: str) -> None:
    """Check that prunus writes a type of GGUF.

    Raises:
        ValueError: It does not; the message lists the types that there are.
    """
    if name in TYPE_NAMES:
        return
    if name.upper() not in TYPE_NAMES and _PRESET(name):
        raise ValueError(
            f"{name} is a preset of several types: give `size` {name}, and prunus chooses the "
            f"types within the bytes of its file, or one of {', '.join(TYPE_NAMES)} for all linears"
        )
    raise ValueError(
        f"{name} is not a type that prunus writes: give one of {', '.join(TYPE_NAMES)}, or as "
        f"`types_from` a file with the types of all tensors{did_you_mean(name, TYPE_NAMES)}"
    )


def times_of(name: str) -> dict[str, float]:
    """Type -> nanoseconds per weight, as far as a table or a file has it.

    Args:
        name: A key of `SPEEDS`, or the path of a file that `benchmarks/type_speeds.py` wrote.

    Raises:
        ValueError: It is neither, or a time is not positive and finite.
    """
    times = SPEEDS.get(name)
    if times is None:
        try:
            entries = read_json(Path(name))["nanoseconds per weight"]
            times = {kind: float(entry["decode"]) for kind, entry in entries.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`fast_on` must be one of {', '.join(SPEEDS)}, or a file that "
                f"benchmarks/type_speeds.py wrote, not {name}. GPUs need no `fast_on`: there the "
                "smallest file is the fastest"
            ) from error
        for kind, time in times.items():
            # This leaves out infinity and NaN, and all from which either would follow.
            if not 1 / UNKNOWN < time < UNKNOWN:
                raise ValueError(
                    f"{name} says that a weight of {kind} takes {time:g} nanoseconds, which no "
                    "processor does: measure it again with benchmarks/type_speeds.py"
                )
    return times
