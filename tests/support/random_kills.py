"""A child of the test of faults: forks runs of every verb and kills them at random moments.

    python random_kills.py FOLDER SCRATCH SEED VERB:KILLS ...

The moments are seeded. It prints one JSON line with, for each kill: the verb, the share of the run
after which it came, the faults that an audit of the folder found, how the next run ended, and which
files differ from those of an undisturbed run. With VERB/EVERY, runs die at each such place where a
file gets its name; it prints verb -> the results of `kill_everywhere`.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

# A fork has one thread. No other thread may hold a lock at that moment, as the threads of tqdm and
# of transformers' loading would.
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"

import torch
import tqdm

tqdm.tqdm.monitor_interval = 0
# tqdm's own lock is shared between processes: a killed child that holds it would block all others.
tqdm.tqdm.set_lock(threading.RLock())
torch.set_num_threads(1)

from safetensors import safe_open  # noqa: E402

import prunus  # noqa: E402
from kill_points import fork, kill_everywhere  # noqa: E402
from prunus.formats.gguf.import_checkpoint import import_gguf  # noqa: E402
from prunus.model.checkpoint.files import RECORD_FILES, TEMPORARY_SUFFIX  # noqa: E402
from prunus.model.checkpoint.tensor_files import INDEX_NAME  # noqa: E402
from prunus.sweeping.grid import Sweep  # noqa: E402
from prunus.sweeping.sweep import sweep as run_sweep  # noqa: E402
from recovery_cases import recover  # noqa: E402
from stopping import timeless  # noqa: E402

MAX_SECONDS = 60
GGUF_NAME = "tiny.gguf"


def verbs(folder: Path) -> dict[str, Callable[[Path], object]]:
    """What each verb does with its output.

    `folder` holds what it works on: `dense`, `pruned`, `text.txt` and `ids.safetensors`.
    """
    dense, pruned, text = folder / "dense", folder / "pruned", folder / "text.txt"
    ids = folder / "ids.safetensors"
    windows = torch.arange(96).reshape(6, 16) % 120
    given = {"calibration": windows, "batch": 2, "dtype": "float32"}

    def training(model: Path, mode: str) -> Callable[[Path], object]:
        return lambda out: recover(model, out, mode, text, evaluations=2, tokens=128)

    scoring = {"texts": [str(ids)], "seqlen": 16, "samples": 2}
    sweep = Sweep.model_validate(
        {
            "title": "t",
            "models": [str(dense)],
            "recipe": {"calibration": str(ids), "samples": 3, "seqlen": 16, "dtype": "float32"},
            "scoring": scoring,
            "grid": [{"method": ["magnitude", "wanda"], "sparsity": 0.5}],
            "keep_checkpoints": True,
        }
    )
    return {
        "prune": lambda out: prunus.prune(dense, out, **given),
        "compress": lambda out: prunus.compress(dense, out, 4, **given),
        "shrink": lambda out: prunus.shrink(dense, out, blocks=1, **given),
        "recover-masked": training(pruned, "masked"),
        "recover-lora": training(pruned, "lora"),
        "recover-full": training(dense, "full"),
        "sweep": lambda out: run_sweep(sweep, out),
        "import": lambda out: import_gguf(folder / GGUF_NAME, out, overwrite=True),
    }


def end(process: int) -> int:
    """The wait status of a fork that should end by itself; after `MAX_SECONDS` it is aborted."""
    until = time.monotonic() + MAX_SECONDS
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > until:
            os.kill(process, signal.SIGABRT)
            return os.waitpid(process, 0)[1]
        time.sleep(0.002)


def audit(out: Path) -> list[str]:
    """Faults that no kill may leave: half a file under a final name, a record of a missing file."""
    faults = []
    for path in out.rglob("*"):
        if any(folder.suffix == ".partial" for folder in path.parents):
            continue  # import leaves its folder of unfinished files until the next run
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118
                        file.get_tensor(key)
            elif path.suffix == ".json":
                content = json.loads(path.read_text())
                claimed = []
                records = [name for name in RECORD_FILES if (path.parent / name).exists()]
                if path.name == INDEX_NAME:
                    claimed = list(content["weight_map"].values())
                elif path.name == next(iter(records), None):  # The others are copies.
                    if path.parent.name == "cells" or (
                        any(path.parent.glob("model*")) and not (path.parent / INDEX_NAME).exists()
                    ):
                        continue  # A copy next to the checkpoint of a sweep's cell.
                    claimed = list(content.get("sha256", []))  # an import lists its files
                    if content["state"] == "finished" and content["recipe"].get("mode") != "lora":
                        claimed.append(INDEX_NAME)
                faults += [
                    f"{path.name} names {name}"
                    for name in claimed
                    if not (path.parent / name).exists()
                ]
        except Exception as fault:
            faults.append(f"{path.name}: {type(fault).__name__}: {fault}")
    return faults


def outcome(out: Path) -> dict[str, object]:
    """The content of a finished folder, without times."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        # A kill may leave half of a file in a temporary folder.
        if path.suffix == ".json" and TEMPORARY_SUFFIX not in name:
            found[name] = timeless(json.loads(path.read_text()))
        elif path.is_file() and path.suffix != ".csv":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main() -> None:
    folder, scratch = map(Path, sys.argv[1:3])
    moments = random.Random(int(sys.argv[3]))
    known, results = verbs(folder), []
    if "/" in sys.argv[4]:
        found = {}
        for verb, every in (argument.split("/") for argument in sys.argv[4:]):
            places = ((number, number % 3 == 0) for number in itertools.count(0, int(every)))
            found[verb] = kill_everywhere(known[verb], scratch, places)
        print(json.dumps(found))
        return
    for argument in sys.argv[4:]:
        verb, kills = argument.split(":")
        work = known[verb]
        # The first run is in the parent, so that the forks need not import the model's code again.
        # A process with one thread forks safely.
        work(scratch / f"{verb}-whole")
        expected, out = outcome(scratch / f"{verb}-whole"), scratch / "killed"
        shutil.rmtree(out, ignore_errors=True)
        began = time.monotonic()
        assert end(fork(lambda: work(out))) == 0  # noqa: B023
        length, fallen, tries = time.monotonic() - began, 0, 0
        while fallen < int(kills) and tries < 4 * int(kills):
            tries += 1
            shutil.rmtree(out, ignore_errors=True)
            # Sometimes the resumed run is killed as well.
            for _ in range(moments.choice((1, 1, 2, 3))):
                share = moments.random()
                process = fork(lambda: work(out))  # noqa: B023
                time.sleep(share * length)
                os.kill(process, signal.SIGKILL)
                if os.WIFSIGNALED(os.waitpid(process, 0)[1]):
                    fallen += 1
                    faults = audit(out)
                    # An import gives a whole model or none, also over an earlier result.
                    if verb == "import" and (out / "config.json").exists():
                        found = outcome(out)
                        # It says that all files have their names after they have them. Until then
                        # its record names these files, and nothing else.
                        record, whole = (x["prunus-import.json"] for x in (found, expected))
                        if record["state"] == "running" and {*whole["files"]} <= {*record["files"]}:
                            found["prunus-import.json"] = whole
                        faults += [name for name in expected if found.get(name) != expected[name]]
                    results.append({"verb": verb, "share": round(share, 3), "audit": faults})
            if results and results[-1]["verb"] == verb:
                status = end(fork(lambda: work(out)))  # noqa: B023
                found = outcome(out)
                results[-1] |= {
                    "status": status,
                    "differs": [
                        name for name in expected | found if expected.get(name) != found.get(name)
                    ],
                    "left": [path.name for path in scratch.glob(".*")],
                }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
