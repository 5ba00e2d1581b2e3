"""Compare the solvers with plain matrix products in speed.

    python benchmarks/solvers.py [--shapes 576x576,1536x576,576x1536] [--rounds 3] [--threads 1]
        [--json FILE]

For each shape (out x in) a solver runs on the Gram matrix of 4 tokens per input. The output has the
processor time, and the share of the rate of a plain float32 product of the same shape. The share
counts only the arithmetic that the solver needs at least. The best of the rounds counts. ALPS takes
its steps in bfloat16 where the processor supports it, so its share can exceed 100 %.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prunus.hardware.machine import describe_hardware, versions
from prunus.methods import METHODS, MethodOptions, compose
from prunus.methods.patterns import Pattern
from prunus.methods.statistics import InputStatistics

# The number of ADMM iterations whose arithmetic the share of ALPS counts.
_ALPS_STEPS = 16


def seconds(work: Callable[[], Any]) -> float:
    """The processor time of one call, in seconds."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(rows: int, columns: int, rounds: int) -> dict[str, dict[str, float]]:
    """Name -> seconds, and share of the product rate (0 where the arithmetic is not counted)."""
    torch.manual_seed(0)
    mixing_II = torch.eye(columns) + torch.randn(columns, columns) / columns**0.5
    X_TI = torch.randn(4 * columns, columns) @ mixing_II
    weight_OI = torch.randn(rows, columns)
    product = 2.0 * rows * columns**2
    statistics = InputStatistics(columns, "gram")
    statistics.add(X_TI)
    gram_II = statistics.gram_II
    assert gram_II is not None

    def prune(method: str, **options: Any) -> Callable[[], Any]:
        chosen = MethodOptions(**options)
        composed = compose(METHODS[method], chosen)

        def work() -> None:
            statistics._derived.clear()
            composed.prune(weight_OI, statistics, Pattern(), 0.5, chosen)

        return work

    def gram() -> None:
        InputStatistics(columns, "gram").add(X_TI)

    def conjugate_steps(method: str, **options: Any) -> int:
        chosen = MethodOptions(**options)
        pruned = compose(METHODS[method], chosen).prune(
            weight_OI, statistics, Pattern(), 0.5, chosen
        )
        return int(pruned.notes["conjugate_gradients"]) + 1

    inverse = columns**3
    alps_products = _ALPS_STEPS + conjugate_steps("alps")
    cases: dict[str, tuple[Callable[[], Any], float]] = {
        "product": (lambda: weight_OI @ gram_II, product),
        "gram": (gram, 2.0 * len(X_TI) * columns**2),
        "sparsegpt": (prune("sparsegpt"), inverse + product / 2),
        "alps": (prune("alps"), alps_products * product + 8 * inverse),
        "wanda + least squares": (
            prune("wanda", weight_update="least-squares"),
            conjugate_steps("wanda", weight_update="least-squares") * product,
        ),
    }
    best: dict[str, float] = {}
    # The first round warms up.
    for _ in range(rounds + 1):
        for name, (work, _) in cases.items():
            best[name] = min(best.get(name, float("inf")), seconds(work))
    rate = product / best["product"]
    return {
        name: {"seconds": best[name], "share": flops / best[name] / rate}
        for name, (_, flops) in cases.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="576x576,1536x576,576x1536")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    with torch.no_grad():
        for shape in options.shapes.split(","):
            rows, columns = (int(side) for side in shape.split("x"))
            found[shape] = measure(rows, columns, options.rounds)
            for name, figures in found[shape].items():
                share = f"{figures['share']:7.0%}" if figures["share"] else "       "
                print(f"{shape:>12} {name:21} {1000 * figures['seconds']:9.1f} ms {share}")
    if options.json:
        content = {
            "machine": describe_hardware(torch.device("cpu")),
            "versions": versions(),
            "shapes": found,
        }
        options.json.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
