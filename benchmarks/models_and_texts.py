"""What each method loses, on several models and kinds of text.

    python benchmarks/models_and_texts.py WORK NAME=CHECKPOINT ... --data DIR \\
        --json docs/results/models-and-texts.json

Every model is made smaller by every method with one calibration, 64 windows of 256 tokens of `mix`,
and scored on 8 windows of 512 tokens of each text against the dense model. A cell that is in the
JSON file is not measured again. `--methods` chooses some, also of those that remove whole blocks or
experts, which calibrate on C4. The models stay in WORK, a folder each, for `prunus eval --tasks`.
benchmarks/plots.py makes the table and the plot of the results page.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

import prunus
from prunus.hardware.machine import describe_hardware, versions

CALIBRATION: dict[str, Any] = {"calibration": "mix", "samples": 64, "seqlen": 256}
SCORING: dict[str, Any] = {"samples": 8, "seqlen": 512}
TEXTS = ("wikitext2", "c4", "python-code")
METHODS: dict[str, dict[str, Any]] = {
    "Wanda": {"preset": "fast"},
    "SparseGPT": {"method": "sparsegpt"},
    "balanced": {"preset": "balanced"},
    "best": {"preset": "best"},
    "best, recovered": {"minutes": 20},
}
C4: dict[str, Any] = {"calibration": "c4", "samples": 32, "seqlen": 256}
#: Blocks of which a share is left at most, and experts of which a share goes, by `prunus.shrink`.
PARTS: dict[str, dict[str, Any]] = {
    f"{share:.0%} of the blocks{', repair' if repair else ''}": C4
    | {"blocks": share, "repair": repair, "batch": 1}
    for share in (0.9, 0.75, 0.6)
    for repair in (False, True)
} | {
    f"{saliency}, {share:.0%} of the experts go{', repair' if repair else ''}": C4
    | {"experts": share, "saliency": saliency, "repair": repair}
    for share in (0.25, 0.5)
    for saliency in ("reap", "contribution")
    for repair in (False, True)
}


def measure(dense: Path, options: dict[str, Any], out: Path, data: Path) -> dict[str, Any]:
    """Make a model smaller and score it: per text perplexity and divergence."""
    shutil.rmtree(out, ignore_errors=True)
    options = {"data": data, **CALIBRATION, **options}
    if "minutes" in options:
        minutes, pruned = options.pop("minutes"), out.with_name(f"{out.name}-pruned")
        prunus.prune(dense, pruned, preset="best", progress=False, overwrite=True, **options)
        prunus.recover(pruned, out, "masked", teacher=dense, minutes=minutes, data=data)
    elif "repair" in options:
        if "blocks" in options:
            blocks = json.loads((dense / "config.json").read_text("utf-8"))["num_hidden_layers"]
            options["blocks"] = int(options["blocks"] * blocks)
        prunus.shrink(dense, out, progress=False, **options)
    else:
        make: Any = prunus.compress if "bits" in options else prunus.prune
        make(dense, out, progress=False, **options)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("models", nargs="+", help="NAME=CHECKPOINT")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--methods", default=";".join(METHODS), help="Default: %(default)s")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"calibration": CALIBRATION, "scoring": SCORING, "cells": {}}
    if arguments.json.exists():
        figures = json.loads(arguments.json.read_text(encoding="utf-8"))
    figures |= {"hardware": describe_hardware(torch.device("cpu")), "versions": versions()}
    for given in arguments.models:
        name, _, folder = given.partition("=")
        cells = figures["cells"].setdefault(name, {})
        for method, options in (METHODS | PARTS).items():
            if method in cells or method not in arguments.methods.split(";"):
                continue
            cells[method] = measure(
                Path(folder), options, arguments.work / f"{name} {method}", arguments.data
            )
            print(name, method, json.dumps(cells[method]), flush=True)
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
