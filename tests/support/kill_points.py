"""A child of the resume tests: forks runs that die of SIGKILL wherever a file gets its final name.

With `type` or `gguf` among the options, the result is a GGUF file.

python kill_points.py DENSE SCRATCH [OPTIONS [before]]

OPTIONS is a JSON object with options of `prune`. With `before`, runs die at every second rename.
It prints one JSON line: the results of `kill_everywhere`.
"""

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

import prunus  # noqa: E402

RENAME, LINK = os.replace, os.link


def fork(work: Callable[[], object]) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return process


def child(work: Callable[[], object]) -> int:
    return os.waitpid(fork(work), 0)[1]


def die_at(rename: int, after: bool) -> None:
    """Let this process die before or after one of its renames; a link is one as well."""
    count = 0

    def dying(work):
        def replace(source, target):
            nonlocal count
            if count == rename and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            work(source, target)
            if count == rename and after:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        return replace

    os.replace, os.link = dying(RENAME), dying(LINK)


def digests(out: Path) -> dict[str, str]:
    files = {"": out} if out.is_file() else {x.name: x for x in out.glob("*.safetensors")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def clear(scratch: Path, name: str) -> None:
    """Remove a result, and the folder of an unfinished one."""
    for path in scratch.glob(f"{name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def kill_everywhere(
    work: Callable[[Path], object],
    scratch: Path,
    places: Iterable[tuple[int, bool]],
    suffix: str = "",
) -> list[dict[str, Any]]:
    """For each kill, what it left, how the next run ended, and whether its weights are the same."""
    # The first run is in the parent, so that the forks need not import the model's code again. A
    # process with one thread forks safely.
    whole, out, results = scratch / f"whole{suffix}", scratch / f"killed{suffix}", []
    clear(scratch, "whole")
    work(whole)
    for place in places:
        clear(scratch, "killed")
        status = child(lambda: (die_at(*place), work(out)))  # noqa: B023
        if status == 0:
            return results
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        found = sorted(path.name for each in scratch.glob("killed*") for path in each.rglob("*"))
        beside = [path.name for path in scratch.glob("killed*")]
        second = child(lambda: work(out))
        left = [x.name for x in out.rglob("*") if x.name.startswith(("best-", ".prunus"))]
        left += [path.name for path in out.glob("*.partial")]
        names = {path.name.replace("whole", "killed") for path in scratch.glob("whole*")}
        left += names ^ {path.name for path in scratch.glob("killed*")}
        equal = digests(out) == digests(whole)
        state = {"found": found, "beside": beside, "status": second}
        results.append({**state, "equal": equal, "left_behind": left})
    raise AssertionError("no run ended")


def main() -> None:
    dense, scratch = sys.argv[1], Path(sys.argv[2])
    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    suffix = ".gguf" if options.pop("gguf", "type" in options) else ""
    verb = prunus.compress if options.keys() & {"bits", "type"} else prunus.prune
    given = {"calibration": torch.arange(32).reshape(2, 16) % 120, "batch": 1, "dtype": "float32"}
    # The moment after a rename is like the moment before the next one: every third is enough.
    ways = [(False, 2)] if sys.argv[4:] == ["before"] else [(False, 1), (True, 3)]
    results = []
    for after, step in ways:
        places = ((number, after) for number in itertools.count(0, step))
        results += kill_everywhere(
            lambda out: verb(dense, out, **given, **options), scratch, places, suffix
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
