"""Tables of forecast costs on other hardware: models, growth, ranks. This script measures nothing.

    python benchmarks/scaling_tables.py

All numbers come from the cost model of `prunus plan --model-shape`. benchmarks/forecast_check.py
compares it with runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prunus.hardware.rates import parse_devices
from prunus.pruning.forecast import Shape, find_shape, forecast

MODELS = ["llama-7b", "llama-13b", "llama-30b", "llama-65b", "llama2-70b", "llama3-405b"]
WINDOWS, TOKENS = 128, 2048


def expected(
    shape: Shape, devices: str, method: str, windows: int = WINDOWS, tokens: int = TOKENS
) -> dict[str, Any]:
    """The forecast of one run."""
    return forecast(shape, parse_devices(devices), method, windows, tokens)


def spent(seconds: float) -> str:
    """Seconds in the largest unit of which there are at least two.

    >>> spent(7200), spent(119)
    ('2.0 h', '119 s')
    """
    for unit, size, digits in (("d", 86400, 0), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def models() -> None:
    """Memory and time of the larger models, on two cores and on eight GPUs."""
    print(
        "| model | method | 2 cores: memory | time | 8 H100 (not measured): memory per rank ",
        end="",
    )
    print("| traffic to each | time | communication |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in MODELS:
        for method in ("wanda", "sparsegpt"):
            cores, cards = (
                expected(find_shape(name), devices, method) for devices in ("2-cores", "8xh100")
            )
            share = cards["parts"]["communication"] / cards["seconds"]
            print(
                f"| {name} | {method} | {cores['memory'] / 1e9:.0f} GB | {spent(cores['seconds'])} "
                f"| {cards['memory'] / 1e9:.0f} GB | {cards['traffic'] / 1e9:.1f} GB "
                f"| {spent(cards['seconds'])} | {share:.1%} |"
            )


def growth() -> None:
    """How time and memory change when one dimension is doubled."""
    one = find_shape("llama-7b")
    wide = replace(
        one,
        hidden=2 * one.hidden,
        intermediate=2 * one.intermediate,
        heads=2 * one.heads,
        kv_heads=2 * one.kv_heads,
    )
    before = expected(one, "2-cores", "wanda")
    doubled = {
        "width": expected(wide, "2-cores", "wanda"),
        "depth": expected(replace(one, blocks=2 * one.blocks), "2-cores", "wanda"),
        "windows": expected(one, "2-cores", "wanda", windows=2 * WINDOWS),
        "tokens per window": expected(one, "2-cores", "wanda", tokens=2 * TOKENS),
    }
    print("| what is doubled (llama-7b, 2 cores, wanda) | time | memory |\n| --- | ---: | ---: |")
    for what, after in doubled.items():
        time, memory = (after[key] / before[key] for key in ("seconds", "memory"))
        print(f"| {what} | × {time:.2f} | × {memory:.2f} |")


def ranks() -> None:
    """How time shrinks with the number of ranks, and where it goes."""
    print("| ranks of 8 cores | wanda: time | forward | solve | communication ", end="")
    print("| sparsegpt: time | forward and Gram | solve | communication |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for count in (1, 2, 4, 8, 16, 32, 64):
        cells = [str(count)]
        for method in ("wanda", "sparsegpt"):
            found = expected(find_shape("llama-7b"), f"{count}x8-cores", method)
            parts = found["parts"]
            forward = parts["forward"] + parts["statistics"]
            cells += [
                spent(x)
                for x in (found["seconds"], forward, parts["solve"], parts["communication"])
            ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    models()
    print()
    growth()
    print()
    ranks()
