"""Decoding speed of prunus and llama.cpp. Measurements take turns, each in a separate process.

    python benchmarks/llamacpp.py --llama-bench BIN --gguf dense-bf16.gguf \\
        --gguf dense-q8_0.gguf DENSE PACKED …

BIN is llama.cpp's `llama-bench`, built for the processor at use. The GGUF files come from its own
`convert_hf_to_gguf.py` and `llama-quantize`, applied to the same dense checkpoint. Both programs
decode after a prompt of the same length and use the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prunus.evaluation.speed import bench


def llama_decode(program: Path, file: Path, depth: int, new_tokens: int, threads: int) -> float:
    """Tokens per second of one llama-bench process that decodes after `depth` tokens."""
    command = [
        program,
        "-m",
        file,
        "-p",
        "0",
        "-n",
        new_tokens,
        "-d",
        depth,
        "-t",
        threads,
        "-r",
        "1",
        "-o",
        "json",
    ]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout)[0]["avg_ts"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="checkpoint folders for prunus")
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, action="append", required=True)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    found: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for file in options.gguf:
            settings = (options.prompt_tokens, options.new_tokens, options.threads)
            found.setdefault(f"llama.cpp {file.name}", []).append(
                llama_decode(options.llama_bench, file, *settings)
            )
        for speed in bench(
            options.models,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            rounds=1,
            threads=options.threads,
        ):
            found.setdefault(f"prunus {speed.model}", []).append(speed.decode_tokens_per_second[1])

    medians = {name: statistics.median(values) for name, values in found.items()}
    table = Table(
        "program and model", "decode tokens/s", *(f"/ {file.name}" for file in options.gguf)
    )
    for name, values in found.items():
        ratios = [
            f"{medians[name] / medians[f'llama.cpp {file.name}']:.2f}" for file in options.gguf
        ]
        table.add_row(
            name, f"{medians[name]:.1f} ({min(values):.1f} to {max(values):.1f})", *ratios
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
