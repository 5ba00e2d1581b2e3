"""A child process of test_hostile.py: thousands of damaged checkpoints, with limited memory.

    python hostile.py SCRATCH SEED KIND:CASES ...

Prints one JSON line: kind -> how often each outcome came ("fine", or the class of the error).

A case must end well or with an error made for people. The child exits with a description if a case
raises anything else, takes longer than `LONGEST` seconds, opens a file outside its folder, or
leaves one there. Before each case its number goes to SCRATCH/case, so that a crash can be traced.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

import prunus  # noqa: E402
from hostile_damage import damage_header, damage_json, mutate_bytes  # noqa: E402
from hostile_inputs import more_kinds  # noqa: E402
from prunus.formats.gguf.import_checkpoint import import_gguf  # noqa: E402
from prunus.model.checkpoint import tensor_files  # noqa: E402
from tiny import tiny_checkpoint, tiny_model, token_ids  # noqa: E402

LONGEST = 10
#: Bytes of memory for a case, beyond those of the process before it; the files have 100 kB.
ROOM = 2**30
FOR_PEOPLE = (ValueError, FileNotFoundError, FileExistsError, NotImplementedError)
#: Kinds whose folder becomes one case only when it is damaged.
NEEDS_DAMAGE = ("architecture", "template", "text")


class TooLong(BaseException):
    """A case takes too long."""


def prune(case: Path) -> None:
    prunus.prune(case / "model", case / "out", calibration=token_ids(2, 16), batch=2)


def inspect(case: Path) -> None:
    prunus.inspect(case / "model")


def import_file(case: Path) -> None:
    import_gguf(case / "model" / "model.gguf", case / "out")


def kinds(
    scratch: Path,
) -> dict[str, tuple[Path, Callable[[Path, random.Random], None], Callable[[Path], None]]]:
    """Kind -> a good folder, a function that damages a copy of it, the work to do with the copy."""
    dense = tiny_checkpoint(scratch / "dense")
    sharded = scratch / "sharded"
    tiny_model().save_pretrained(sharded, max_shard_size="50KB")
    small = scratch / "small"
    prunus.compress(dense, small, 4, calibration=token_ids(2, 16), batch=2)
    index = "model.safetensors.index.json"

    def damage_small(model: Path, dice: random.Random) -> None:
        if dice.random() < 0.4:
            damage_json(model / "config.json", dice)
        else:
            damage_header(dice.choice(sorted(model.glob("*.safetensors"))), dice)

    found = {
        "header": (dense, lambda m, dice: damage_header(m / "model.safetensors", dice), prune),
        "index": (sharded, lambda m, dice: damage_json(m / index, dice), inspect),
        "config": (dense, lambda m, dice: damage_json(m / "config.json", dice), prune),
        "integers": (small, damage_small, inspect),
    }
    try:
        from tiny_gguf import tiny_llama, write_gguf
    except ModuleNotFoundError:  # the extra gguf is not installed
        return found
    (scratch / "gguf").mkdir()
    write_gguf(tiny_llama(), scratch / "gguf" / "model.gguf")
    head = (scratch / "gguf" / "model.gguf").stat().st_size // 3

    def damage_gguf(model: Path, dice: random.Random) -> None:
        path = model / "model.gguf"
        path.write_bytes(mutate_bytes(path.read_bytes(), dice, dice.choice((200, 2000, head))))

    return found | {"gguf": (scratch / "gguf", damage_gguf, import_file)}


def watch_opened_files(scratch: Path, case: Path) -> list[str]:
    """A list to which each file is added that is opened in `scratch` but outside `case`."""
    seen: list[str] = []

    def note(name: Any) -> None:
        if isinstance(name, str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(name))
            inside = path.startswith(str(case) + os.sep) or path == str(case)
            if (path.startswith(str(scratch) + os.sep) and not inside) or path == "/etc/passwd":
                seen.append(path)

    sys.addaudithook(lambda event, arguments: note(arguments[0]) if event == "open" else None)
    # The library opens files outside Python, where the audit hook does not see it.
    safe_open = tensor_files.safe_open

    def noting(path: Any, *arguments: Any, **options: Any) -> Any:
        note(path)
        return safe_open(path, *arguments, **options)

    tensor_files.safe_open = noting
    return seen


def main() -> None:
    scratch = Path(sys.argv[1]).resolve()
    known = kinds(scratch)
    wanted = {argument.split(":")[0] for argument in sys.argv[3:]}
    known |= more_kinds(scratch, wanted)
    known = {kind: parts for kind, parts in known.items() if kind in wanted}
    # Work on the good folders once, so that all imports come before memory is limited.
    for name, (good, damage, work) in known.items():
        shutil.copytree(good, scratch / "warm" / name / "model")
        if name in NEEDS_DAMAGE:
            damage(scratch / "warm" / name / "model", random.Random(0))
        with contextlib.suppress(*FOR_PEOPLE):
            work(scratch / "warm" / name)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))

    def too_long(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    case = scratch / "case-folder"
    marker = os.open(scratch / "case", os.O_WRONLY | os.O_CREAT)
    seen = watch_opened_files(scratch, case)
    outcomes: dict[str, Counter[str]] = {}
    for argument in sys.argv[3:]:
        kind, cases = argument.split(":")
        if kind not in known:
            continue
        good, damage, work = known[kind]
        count = outcomes[kind] = Counter()
        for number in range(int(cases)):
            dice = random.Random(f"{sys.argv[2]} {kind} {number}")
            shutil.rmtree(case, ignore_errors=True)
            shutil.copytree(good, case / "model")
            damage(case / "model", dice)
            seen.clear()
            before = sorted(str(path) for path in scratch.iterdir())
            os.pwrite(marker, f"{kind} {number}".ljust(40).encode(), 0)
            trouble = ""
            signal.alarm(LONGEST)
            try:
                work(case)
                count["fine"] += 1
            except FOR_PEOPLE as fault:
                count[type(fault).__name__] += 1
                if len(str(fault)) < 20:
                    trouble = f"says too little: {fault!r}"
            except TooLong:
                trouble = f"took longer than {LONGEST} s: {traceback.format_exc()[-1500:]}"
            except BaseException:
                trouble = traceback.format_exc()[-2500:]
            finally:
                signal.alarm(0)
            if seen:
                trouble = f"opened {seen}"
            if sorted(str(path) for path in scratch.iterdir()) != before:
                trouble = "wrote outside its folder"
            if trouble:
                shutil.copytree(case, scratch / "found", dirs_exist_ok=True)
                sys.exit(f"{kind} case {number}: {trouble}")
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
