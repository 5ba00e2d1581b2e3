"""What whole blocks cost: smaller models without repair, with it, and trained afterwards.

    python benchmarks/structure.py MODEL SCRATCH --data DIR [--sizes 0.9 0.75 0.6] [--samples 32]
        [--seqlen 512] [--tokens N] [--json FILE]

MODEL is a checkpoint folder. A size is the share of its blocks that stays at most. The search by KL
divergence chooses the blocks. With --tokens, the model with repair is also trained towards MODEL on
so many tokens (`prunus recover --mode full`).

A row has the KL divergence from MODEL and the perplexity on each text, and the seconds of processor
time of all threads; of a run that was interrupted, only those of its last part. It is in the JSON
file as soon as it is measured, and the same command skips the rows that are there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import prunus
from prunus.hardware.machine import describe_hardware, versions
from prunus.model.checkpoint.files import read_json, write_json


def smaller(given: argparse.Namespace, way: str, size: float, folder: Path) -> None:
    """Write the model of a row to a folder."""
    data = {"data": given.data, "seqlen": given.seqlen, "progress": False}
    if way == "recovery":
        repaired = folder.with_name(f"{size:g}-repair")
        prunus.recover(
            repaired, folder, "full", teacher=given.model, tokens=given.tokens, text="c4", **data
        )
        return
    blocks = read_json(given.model / "config.json")["num_hidden_layers"]
    # Both ways train or search with the batch that repair takes.
    options = {"samples": given.samples, "batch": 1, "repair": way == "repair", **data}
    prunus.shrink(given.model, folder, blocks=int(size * blocks), calibration="c4", **options)


def scores(given: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """By text: perplexity, that of the dense model, and the KL divergence with its error."""
    found = {}
    for text in given.texts:
        windows = {"seqlen": given.eval_seqlen, "samples": given.limit, "data": given.data}
        result = prunus.perplexity(folder, text, reference=given.model, progress=False, **windows)
        divergence = result.divergence
        assert divergence is not None
        found[text] = {
            "perplexity": result.perplexity,
            "dense": divergence.reference_perplexity,
            "kl": divergence.kl,
            "kl_stderr": divergence.kl_stderr,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="checkpoint folder of the dense model")
    parser.add_argument("scratch", type=Path, help="folder for the smaller models")
    parser.add_argument("--data", type=Path, help="folder with local copies of the datasets")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.9, 0.75, 0.6])
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens per calibration window")
    parser.add_argument("--tokens", type=int, default=0, help="of recovery; 0 for none")
    parser.add_argument("--texts", nargs="+", default=["wikitext2", "c4"], help="texts to score")
    parser.add_argument("--limit", type=int, default=8, help="windows of each text to score")
    parser.add_argument("--eval-seqlen", type=int, default=512, help="tokens per scored window")
    parser.add_argument("--json", type=Path, help="results; by default SCRATCH/structure.json")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    file = given.json or given.scratch / "structure.json"
    rows: dict[str, Any] = read_json(file)["rows"] if file.exists() else {}
    ways = ["blocks", "repair", *(["recovery"] if given.tokens else [])]
    for size in given.sizes:
        for way in ways:
            key = f"{size:g}-{way}"
            if key in rows:
                continue
            started = time.process_time()
            smaller(given, way, size, given.scratch / key)
            seconds = round(time.process_time() - started)
            rows[key] = {"seconds": seconds, "scores": scores(given, given.scratch / key)}
            facts = {"hardware": describe_hardware(torch.device("cpu")), "versions": versions()}
            write_json(file, {**facts, "rows": rows})
            print(key, json.dumps(rows[key]), flush=True)


if __name__ == "__main__":
    main()
