"""What each method loses, on several models and kinds of text: one table and one plot.

    python benchmarks/models_and_texts.py WORK NAME=CHECKPOINT ... --data DIR \\
        --json docs/results/models-and-texts.json --svg docs/results/models-and-texts.svg

Every model is made smaller by every method with one calibration, 64 windows of 256 tokens of `mix`,
and scored on 8 windows of 512 tokens of each text against the dense model. A cell that is in the
JSON file is not measured again. `--methods` chooses some.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

import prunus
from prunus.hardware.memory import describe_hardware, versions

CALIBRATION: dict[str, Any] = {"calibration": "mix", "samples": 64, "seqlen": 256}
SCORING: dict[str, Any] = {"samples": 8, "seqlen": 512}
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4", "python-code": "Python"}
METHODS: dict[str, dict[str, Any]] = {
    "Wanda": {"preset": "fast"},
    "SparseGPT": {"method": "sparsegpt"},
    "balanced": {"preset": "balanced"},
    "best": {"preset": "best"},
    "compress 2.7 bits": {"bits": 2.7},
}
COLOURS = ["#9aa0a6", "#c58b3c", "#4c8c6a", "#1f5f8b", "#8b3f6e"]


def measure(dense: Path, options: dict[str, Any], work: Path, data: Path) -> dict[str, Any]:
    """Make a model smaller and score it: per text perplexity and divergence."""
    out = work / "model"
    shutil.rmtree(out, ignore_errors=True)
    make: Any = prunus.compress if "bits" in options else prunus.prune
    make(dense, out, data=data, progress=False, **CALIBRATION, **options)
    found: dict[str, Any] = {"texts": {}}
    for text in TEXTS:
        scored = prunus.perplexity(out, text, reference=dense, data=data, progress=False, **SCORING)
        divergence = scored.divergence
        assert divergence is not None
        found["texts"][text] = {
            "dense": divergence.reference_perplexity,
            "perplexity": scored.perplexity,
            "kl": divergence.kl,
            "kl_stderr": divergence.kl_stderr,
        }
    return found


def table(cells: dict[str, dict[str, Any]]) -> str:
    """The cells in Markdown: KL divergence ± standard error, and perplexity."""
    lines = [
        "| model | method | " + " | ".join(TEXTS.values()) + " |",
        "| --- | --- |" + " ---: |" * len(TEXTS),
    ]
    for model, methods in cells.items():
        first = next(iter(methods.values()))["texts"]
        dense = " | ".join(f"{first[text]['dense']:.2f}" for text in TEXTS)
        lines.append(f"| {model} | dense | {dense} |")
        for method, cell in methods.items():
            scores = " | ".join(
                f"{each['kl']:.3f} ± {each['kl_stderr']:.3f}, {each['perplexity']:.2f}"
                for each in (cell["texts"][text] for text in TEXTS)
            )
            lines.append(f"| | {method} | {scores} |")
    return "\n".join(lines)


def plot(cells: dict[str, dict[str, Any]]) -> str:
    """Bars of the KL divergence, one group for each model and text, as SVG."""
    groups = [(model, text) for model in cells for text in TEXTS]
    highest = max(c["texts"][t]["kl"] for m in cells.values() for c in m.values() for t in TEXTS)
    width, height, top, left = 16, 220, 40, 50
    wide = (len(METHODS) + 1.5) * width
    total = left + wide * len(groups) + 10
    parts = []
    for tick in range(int(highest * 5) + 1):
        y = top + height * (1 - tick / 5 / highest)
        parts.append(f'<line x1="{left}" x2="{total}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick / 5:.1f}</text>'
        )
    for place, (model, text) in enumerate(groups):
        x = left + place * wide + 8
        for number, method in enumerate(METHODS):
            if method in cells[model]:
                bar = height * cells[model][method]["texts"][text]["kl"] / highest
                parts.append(
                    f'<rect x="{x + number * width:.1f}" y="{top + height - bar:.1f}" '
                    f'width="{width - 3}" height="{bar:.1f}" fill="{COLOURS[number]}"/>'
                )
        middle = x + len(METHODS) * width / 2
        y = top + height + 16
        parts.append(f'<text x="{middle:.1f}" y="{y}" text-anchor="middle">{TEXTS[text]}</text>')
        if place % len(TEXTS) == 1:
            parts.append(f'<text x="{middle:.1f}" y="{y + 18}" text-anchor="middle">{model}</text>')
    for number, method in enumerate(METHODS):
        x = left + number * 140
        parts.append(f'<rect x="{x}" y="8" width="12" height="12" fill="{COLOURS[number]}"/>')
        parts.append(f'<text x="{x + 18}" y="18">{method}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(total, 760):.0f} '
        f'{top + height + 44}" font-family="sans-serif" font-size="12" fill="#808080">'
        + "".join(parts)
        + "</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("models", nargs="+", help="NAME=CHECKPOINT")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--svg", type=Path)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"calibration": CALIBRATION, "scoring": SCORING, "cells": {}}
    if arguments.json.exists():
        figures = json.loads(arguments.json.read_text(encoding="utf-8"))
    figures |= {"hardware": describe_hardware(torch.device("cpu")), "versions": versions()}
    for given in arguments.models:
        name, _, folder = given.partition("=")
        cells = figures["cells"].setdefault(name, {})
        for method, options in METHODS.items():
            if method in cells or method not in arguments.methods.split(","):
                continue
            cells[method] = measure(Path(folder), options, arguments.work, arguments.data)
            print(name, method, json.dumps(cells[method]), flush=True)
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(table(figures["cells"]))
    if arguments.svg:
        arguments.svg.write_text(plot(figures["cells"]), encoding="utf-8")


if __name__ == "__main__":
    main()
