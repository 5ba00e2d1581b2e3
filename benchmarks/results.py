"""Run what docs/results and the tables of the pages need: `make results`.

    python benchmarks/results.py [NAME ...] --models DIR [--data DIR] [--work DIR]

Without names, it runs the results on pages whose figures are of another minor version than the
package, or missing. With names, it runs these. DIR has the models in folders, named as results.toml
says. A result is a list of rows: commands of prunus, each a process of its own on one thread, whose
model is then scored against the dense one. Or it is a script.

Figures are collected in WORK and get their place in docs/results when all of a result are there. A
run that was stopped goes on; a row is measured once. At the end, the tables of the pages are made
anew. A row has its command, the minutes of one core, the peak of its memory, the bytes of its
weights and the scores of its texts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import plots
from figures import LIST, RESULTS, ROOT, checkpoint, is_fresh, load, read, save, weight_bytes

from prunus.model.checkpoint.files import remove

SHARED = Path(os.environ.get("PRUNUS_SHARED", ROOT.parent / "shared"))


def shown(command: str) -> str:
    """A command of results.toml as one types it."""
    return f"{'python benchmarks/' if '.py ' in command else 'prunus '}{command}"


def run(words: list[str], log: Path) -> tuple[float, int]:
    """Run a command on one thread; the minutes of its processor time, and its peak of memory.

    Args:
        words: A command of prunus; or a script of this folder, for which a variable of the
            environment, such as LLM_COMPRESSOR, names the interpreter.
        log: Where its messages go.

    Raises:
        RuntimeError: It failed, or its interpreter is not named.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "prunus", *words]
    if words[0].endswith(".py"):
        variable = words[0].removesuffix(".py").upper()
        if variable not in os.environ:
            raise RuntimeError(f"{words[0]} needs {variable}, the interpreter of its environment")
        command = [os.environ[variable], str(ROOT / "benchmarks" / words[0]), *words[1:]]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{shlex.join(words)} failed; see {log}")
    return round((usage.ru_utime + usage.ru_stime) / 60, 2), usage.ru_maxrss * 1024


class Measurement:
    """The rows of one result for one model.

    Args:
        result: its entry in results.toml.
        dense: folder of the model.
        work: folder for what the rows make.
    """

    def __init__(self, result: dict[str, Any], dense: Path, work: Path) -> None:
        self.result, self.dense, self.work = result, dense, work
        self.variants: dict[str, str] = result.get("variants", {"": ""})
        work.mkdir(parents=True, exist_ok=True)

    def command(self, row: str, variant: str) -> str:
        """The command of a row, with MODEL, OUT and @ROW for paths."""
        line = f"{self.result['rows'][row]} {self.variants[variant]}"
        return re.sub(r"\{(\w+)\}", lambda match: str(LIST["words"][match[1]]), line).strip()

    def out(self, row: str, variant: str) -> Path:
        suffix = ".gguf" if "OUT.gguf" in self.command(row, variant) else ""
        name = re.sub(r"[^\w.-]+", "-", f"{row} {variant}").strip("-")
        return self.work / f"{name}{suffix}"

    def make(self, row: str, variant: str) -> dict[str, Any]:
        """Make the model of a row, and return what that took."""
        out, command = self.out(row, variant), self.command(row, variant)
        for path in (out, Path(f"{out}.part")):  # what a stopped run left: its time is not known
            remove(path)
        places = {"MODEL": self.dense, "OUT": out, "OUT.gguf": out}
        for name in self.result["rows"]:
            if f"@{name}" in command.split():
                places[f"@{name}"] = before = self.out(name, variant)
                if not before.exists():
                    self.make(name, variant)
        words = [str(places.get(word, word)) for word in command.split()]
        minutes, memory = run(words, self.work / f"{out.name}.log")
        cell = {"command": shown(command), "core_minutes": minutes, "peak_memory": memory}
        return cell | {"bytes": weight_bytes(out), "dense_bytes": weight_bytes(self.dense)}

    def scores(self, row: str, variant: str) -> dict[str, Any]:
        """The scores of a row's model by text; none if the result has no texts."""
        out, texts = self.out(row, variant), self.result.get("texts", [])
        if not texts:
            return {}
        figures = self.work / f"{out.name}-scores.json"
        command = ["eval", str(out), "--reference", str(self.dense), "--json", str(figures)]
        command += ["--perplexity", ",".join(texts), *self.result["scoring"].split()]
        run(command, self.work / f"{out.name}-scores.log")
        found = json.loads(figures.read_text(encoding="utf-8"))["models"][0]["perplexity"]
        keys = ("kl", "kl_stderr", "same_top", "reference_perplexity")
        # With several texts, one more entry has the figures of all of them.
        return {
            text: {"perplexity": each["perplexity"]}
            | {key: each["divergence"][key] for key in keys}
            for text, each in zip(texts, found, strict=False)
        }

    def clear(self, row: str, variant: str) -> None:
        """Remove the model of a row, unless a later row begins with it."""
        if not any(f"@{row}" in line.split() for line in self.result["rows"].values()):
            remove(self.out(row, variant))


def begun(path: Path, command: str, scoring: str = "") -> dict[str, Any]:
    """The figures of a stopped run with this version, machine and scoring; else new ones."""
    from prunus.hardware.machine import processor_name

    figures: dict[str, Any] = {"scoring": scoring} if scoring else {}
    if found := load(path):
        is_same = found["hardware"]["processor"] == processor_name()
        if is_same and is_fresh(found) and found.get("scoring", "") == scoring:
            return found
    save(path, figures, command)
    return figures


def run_rows(name: str, path: Path, models: Path) -> None:
    """Measure the rows of a result for each of its models, as far as they are not in `path`."""
    result, command = LIST["results"][name], f"make results RESULTS={name}"
    figures = begun(path, command, result.get("scoring", ""))
    for model in result["models"]:
        measurement = Measurement(result, checkpoint(model, models), path.parent / name / model)
        before = figures.setdefault("cells", {}).get(model, {})
        cells = figures["cells"][model] = {row: before.get(row, {}) for row in result["rows"]}
        for row in result["rows"]:
            for variant in measurement.variants:
                done = cells[row].get(variant, {})
                if done.get("command") == shown(measurement.command(row, variant)):
                    continue
                cell = measurement.make(row, variant)
                cells[row][variant] = cell | {"texts": measurement.scores(row, variant)}
                save(path, figures, command)
                measurement.clear(row, variant)
                print(f"{name}: {model}, {row} {variant}, {cell['core_minutes']} min", flush=True)
        shutil.rmtree(measurement.work)


def run_script(name: str, path: Path, models: Path, data: Path) -> None:
    """Run the script of a result, which goes on where it stopped."""
    result, work = LIST["results"][name], path.parent / name
    begun(path, f"make results RESULTS={name}")
    words = [sys.executable, ROOT / "benchmarks" / result["script"], work]
    words += [f"{model}={checkpoint(model, models)}" for model in result["models"]]
    words += ["--json", path, *result.get("arguments", "").split()]
    words += ["--data", data] if result["models"] else []
    for variable, option in result.get("environment", {}).items():
        words += [option, os.environ[variable]] if variable in os.environ else []
    work.mkdir(parents=True, exist_ok=True)
    subprocess.run([str(word) for word in words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of results.toml")
    parser.add_argument("--models", type=Path, required=True, help="folder with the models")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="of WikiText-2 and C4")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "results")
    options = parser.parse_args()
    os.environ |= {"PRUNUS_DATA": str(options.data), "OMP_NUM_THREADS": "1"}
    for name in options.names:
        if name not in LIST["results"]:
            parser.error(f"there is no result {name!r}; there are {', '.join(LIST['results'])}")
    stored = {path.stem: is_fresh(read(path.stem)) for path in RESULTS.glob("*.json")}
    due = [name for name, each in LIST["results"].items() if each["pages"] and not stored.get(name)]
    failed = []
    for name in options.names or due:
        path = options.work / f"{name}.json"
        try:
            if "script" in LIST["results"][name]:
                run_script(name, path, options.models, options.data)
            else:
                run_rows(name, path, options.models)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as fault:
            print(f"{name}: {fault}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        shutil.move(path, RESULTS / path.name)
        plots.main()
    if failed:
        sys.exit(f"not finished: {', '.join(failed)}; the same command goes on")


if __name__ == "__main__":
    main()
