"""Speed of packed linears, compared with torch, a dense kernel, and the memory bandwidth.

    python benchmarks/kernels.py [--shapes 4096x4096,11008x4096] [--sparsity 0.5] [--tokens 1] \\
        [--threads 2] [--rounds 40] [--isa NAME] [--json FILE]

In every round each kernel multiplies once. Right before it, a plain loop on the same threads reads
the same number of bytes. "of read" is the median over the rounds of the ratio of their bytes per
second. "x torch" is the ratio of the medians of torch's time for a dense bfloat16 product and the
kernel's. Copies of a matrix take turns, so that none is still in the cache from its last use. If
other programs keep the processor busy, a measurement waits for up to a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from prunus.runtime.bitmap import check, pack_weight
from prunus.runtime.kernels import library as kernels
from prunus.runtime.weight import Coding, PackedWeight

#: Bytes of all copies of a matrix: at least twice as much as the largest caches hold.
WORKING_SET = 160e6


def copies(weight: PackedWeight) -> list[PackedWeight]:
    """Copies of a weight at enough places of memory to exceed the cache."""

    def clone(part: torch.Tensor | None) -> torch.Tensor | None:
        return None if part is None else part.clone()

    return [
        PackedWeight(
            weight.shape,
            weight.values.clone(),
            clone(weight.mask),
            clone(weight.scales),
            weight.coding and Coding(*map(torch.clone, weight.coding)),
        )
        for _ in range(max(2, int(WORKING_SET / weight.nbytes) + 1))
    ]


def make_kernels(
    engine: kernels.Kernels, rows: int, columns: int, sparsity: float, tokens: int
) -> dict[str, tuple[int, Callable[[int], object]]]:
    """The kernels to compare, by name.

    Returns:
        Name -> bytes that the kernel must read, and a function that runs it on copy i of a weight.
    """
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(rows, columns, generator=generator)
    removed = torch.rand(rows, columns, generator=generator) < sparsity
    sparse = dense.masked_fill(removed, 0).bfloat16()
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    made: dict[str, tuple[int, Callable[[int], object]]] = {}

    def add(name: str, nbytes: int, sets: Sequence[Any], run: Callable[..., object]) -> None:
        made[name] = (nbytes, lambda i: run(sets[i % len(sets)]))

    def packed(weight: PackedWeight, name: str) -> None:
        offsets = check(weight)
        add(name, weight.nbytes, copies(weight), lambda w: engine.linear(x, w, offsets, None))

    plain = PackedWeight((rows, columns), sparse[sparse != 0], pack_weight(sparse, torch.int8).mask)
    packed(pack_weight(sparse, torch.bfloat16), "bitmap bf16")
    packed(plain, "bitmap bf16, uncoded")
    packed(pack_weight(sparse, torch.int8), "bitmap int8")
    whole = dense.bfloat16()
    packed(pack_weight(whole, torch.bfloat16), "whole bf16, coded")
    packed(pack_weight(whole, torch.int8), "whole int8")
    dense_weights = copies(PackedWeight((rows, columns), whole.flatten()))
    if engine.has_bfloat16:
        add("dense bf16", whole.nbytes, dense_weights, lambda w: engine.linear(x, w, None, None))
    places = [w.values.view_as(whole) for w in dense_weights]
    add("torch bf16", whole.nbytes, places, lambda w: torch.nn.functional.linear(x, w))
    return made


def wait_for_quiet() -> None:
    """Sleep while another process runs, for at most a second."""
    for _ in range(50):
        try:
            running = Path("/proc/loadavg").read_text().split()[3].split("/")[0]
        except OSError:
            return
        if int(running) <= 1:
            return
        time.sleep(0.02)


def timed(run: Callable[[int], object], turn: int) -> float:
    started = time.perf_counter()
    run(turn)
    return time.perf_counter() - started


def read(engine: kernels.Kernels, data: torch.Tensor) -> None:
    """Sum the bytes of `data` as 64-bit words, as fast as memory can be read."""
    engine.library.prunus_read(torch.get_num_threads(), data.data_ptr(), data.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="4096x4096,11008x4096")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--isa", choices=kernels.ISAS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = kernels.load(options.isa)
    if engine is None:
        raise SystemExit(f"there are no kernels: {kernels.why_not()}")
    torch.set_num_threads(options.threads)
    print(
        f"{kernels.ISAS[engine.isa]}, {options.threads} threads, sparsity {options.sparsity:.0%}, "
        f"tokens {options.tokens}"
    )
    results = []
    for shape in options.shapes.split(","):
        rows, columns = (int(number) for number in shape.split("x"))
        made = make_kernels(engine, rows, columns, options.sparsity, options.tokens)
        plain = torch.ones(int(WORKING_SET) + 2 * rows * columns, dtype=torch.uint8)
        seconds: dict[str, list[float]] = {name: [] for name in made}
        of_read: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(options.rounds + 2):
            for name, (nbytes, run) in made.items():
                wait_for_quiet()
                # The plain loop reads whole pieces of 64 KiB, at another place every time.
                start = turn * nbytes % (plain.numel() - nbytes)
                part = plain[start : start + nbytes]
                reading = timed(lambda _, part=part: read(engine, part), turn)
                taken = timed(run, turn)
                if turn >= 2:
                    seconds[name].append(taken)
                    of_read[name].append(reading / taken * nbytes / (nbytes // 65536 * 65536))
        torch_time = statistics.median(seconds["torch bf16"])
        for name, (nbytes, _) in made.items():
            median = statistics.median(seconds[name])
            row = {
                "shape": shape,
                "kernel": name,
                "milliseconds": round(median * 1e3, 4),
                "fastest": round(min(seconds[name]) * 1e3, 4),
                "gigabytes_per_second": round(nbytes / median / 1e9, 2),
                "of_read": round(statistics.median(of_read[name]), 3),
                "times_torch": round(torch_time / median, 2),
            }
            results.append(row)
            print(
                f"{shape:>11} {name:20} {row['milliseconds']:8.3f} ms "
                f"(fastest {row['fastest']:7.3f})  "
                f"{row['gigabytes_per_second']:6.2f} GB/s  {row['of_read']:6.1%} of read  "
                f"{row['times_torch']:5.2f} x torch"
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
