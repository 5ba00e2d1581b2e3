"""Gain of each mode of `prunus recover` on SmolLM2-135M, pruned by Wanda to 50 % and to 2:4.

    python benchmarks/recovery.py FOLDER [--data DIR] [--model DENSE] [--tokens N] [--only "MODE;…"]

All modes train on the same text with the same number of tokens. C4's first documents are for
calibration, the others for training. Perplexity is measured on the test text of WikiText-2. The
time of a run is the processor time of all its threads, with checkpoints and evaluations.
FOLDER/recovery.md is the resulting table. Runs whose result is in FOLDER/*.json are not repeated.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from fetch_model import fetch_model

from prunus.calibration.corpora import load_corpus
from prunus.model.checkpoint.files import write_text

CALIBRATION_DOCUMENTS, TRAINING_DOCUMENTS = 300, 20_000
PATTERNS = {"50 %": ["--sparsity", "0.5"], "2:4": ["--pattern", "2:4"]}
WINDOWS = ["--seqlen", "256", "--batch", "4"]
# A checkpoint of this model with Adam's moments takes 2 GB on disk, so each run writes only one
# before its end.
TRAINING = [*WINDOWS, "--evaluations", "2"]
MODES: dict[str, list[str]] = {
    "lora": ["--mode", "lora", *TRAINING],
    "masked": ["--mode", "masked", *TRAINING],
    "masked, teacher": ["--mode", "masked", "--teacher", "DENSE", *TRAINING],
}
SCORING = ["--perplexity", "wikitext2", "--seqlen", "1024", "--samples", "16"]


def prunus(*arguments: str, json_file: Path) -> dict[str, Any]:
    """The JSON result of one command, from its file or by running it, with `cpu_minutes`."""
    if not json_file.exists():
        command = [sys.executable, "-m", "prunus", *arguments, "--json", str(json_file)]
        print("$ prunus", shlex.join(command[3:-2]), flush=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        results = json.loads(json_file.read_text()) | {"cpu_minutes": seconds / 60}
        write_text(json_file, json.dumps(results, indent=1))
    return json.loads(json_file.read_text())


def split_c4(folder: Path, data: Path | None) -> None:
    """Write `calibration.jsonl` and `training.jsonl`, which have no document in common."""
    documents = load_corpus("c4", "calibration", data).documents
    parts = {
        "calibration": documents[:CALIBRATION_DOCUMENTS],
        "training": documents[CALIBRATION_DOCUMENTS : CALIBRATION_DOCUMENTS + TRAINING_DOCUMENTS],
    }
    for name, part in parts.items():
        if not (folder / f"{name}.jsonl").exists():
            write_text(
                folder / f"{name}.jsonl", "".join(json.dumps({"text": x}) + "\n" for x in part)
            )


def perplexity(model: Path | str, name: str, folder: Path, data: list[str]) -> float:
    scored = prunus("eval", str(model), *SCORING, *data, json_file=folder / f"{name}-score.json")
    return float(scored["models"][0]["perplexity"][0]["perplexity"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, help="local folder with the corpora")
    parser.add_argument("--model", help="the dense model (default: download it)")
    parser.add_argument("--tokens", type=int, default=40_960, help="training tokens of every run")
    parser.add_argument("--only", default=";".join(MODES), help="modes, separated by ';'")
    given = parser.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    data = ["--data", str(given.data)] if given.data is not None else []
    dense = given.model or str(folder / "dense")
    if given.model is None:
        fetch_model("smollm2-135m", Path(dense), progress=print)
    split_c4(folder, given.data)
    best = perplexity(dense, "dense", folder, data)

    rows: list[str] = []
    for pattern, target in PATTERNS.items():
        slug = pattern.replace(" %", "").replace(":", "of")
        pruned = folder / f"wanda-{slug}"
        calibration = ["--calibration", str(folder / "calibration.jsonl")]
        calibration += ["--samples", "32", "--seqlen", "1024"]
        words = ["prune", dense, str(pruned), *target, *calibration]
        prunus(*words, json_file=folder / f"{pruned.name}.json")
        worst = perplexity(pruned, pruned.name, folder, data)
        for mode, options in MODES.items():
            name = f"{pruned.name}-{mode.replace(', ', '-')}"
            if mode not in given.only.split(";") and not (folder / f"{name}-score.json").exists():
                continue
            options = [dense if word == "DENSE" else word for word in options]
            text = ["--text", str(folder / "training.jsonl"), "--tokens", str(given.tokens)]
            words = ["recover", str(pruned), str(folder / name), *options, *text]
            found = prunus(*words, json_file=folder / f"{name}.json")
            after = perplexity(folder / name, name, folder, data)
            if not mode.startswith("lora"):
                shutil.rmtree(folder / name, ignore_errors=True)
            rows.append(
                f"| {pattern} | {mode} | {worst:.2f} | {after:.2f} "
                f"| {(worst - after) / (worst - best):.0%} "
                f"| {found['totals']['tokens']:,} | {found['cpu_minutes']:.1f} |"
            )
    table = [
        f"Dense: {best:.2f}. WikiText-2, 16 windows of 1024 tokens.",
        "",
        "| Wanda | mode | before | after | gap closed | tokens | core minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]
    write_text(folder / "recovery.md", "\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
