"""Compare the solvers with plain matrix products in speed, and SparseGPT with its pseudo-code.

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
from torch import Tensor

from prunus.hardware.memory import describe_hardware, versions
from prunus.methods import METHODS, MethodOptions, compose
from prunus.methods.patterns import Pattern
from prunus.methods.statistics import InputStatistics

# The number of ADMM iterations whose arithmetic the share of ALPS counts.
_ALPS_STEPS = 16


def from_pseudo_code(
    weight_OI: Tensor, gram_II: Tensor, sparsity: float, block: int = 128
) -> Tensor:
    """Algorithm 1 of arXiv 2301.00774, line by line; each column corrects the rest of its block."""
    weight_OI = weight_OI.clone()
    damped_II = gram_II + 0.01 * gram_II.diagonal().mean() * torch.eye(len(gram_II))
    factor_II = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(damped_II)), upper=True
    )
    for start in range(0, weight_OI.shape[1], block):
        stop = min(start + block, weight_OI.shape[1])
        part_OB, error_OB = (
            weight_OI[:, start:stop].clone(),
            torch.zeros(len(weight_OI), stop - start),
        )
        upper_BB = factor_II[start:stop, start:stop]
        cost_OB = part_OB**2 / upper_BB.diagonal() ** 2
        threshold = cost_OB.flatten().sort().values[int(cost_OB.numel() * sparsity)]
        for j in range(stop - start):
            column_O = part_OB[:, j]
            kept_O = torch.where(cost_OB[:, j] > threshold, column_O, 0)
            error_O = (column_O - kept_O) / upper_BB[j, j]
            part_OB[:, j:] -= error_O[:, None] @ upper_BB[j, j:][None]
            part_OB[:, j] = kept_O
            error_OB[:, j] = error_O
        weight_OI[:, start:stop] = part_OB
        weight_OI[:, stop:] -= error_OB @ factor_II[start:stop, stop:]
    return weight_OI


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
        "pseudo-code": (lambda: from_pseudo_code(weight_OI, gram_II, 0.5), inverse + product / 2),
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
            ratio = found[shape]["pseudo-code"]["seconds"] / found[shape]["sparsegpt"]["seconds"]
            print(f"{shape:>12} sparsegpt is {ratio:.2f} times as fast as its pseudo-code")
    if options.json:
        content = {
            "machine": describe_hardware(torch.device("cpu")),
            "versions": versions(),
            "shapes": found,
        }
        options.json.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
