"""A child of test_whole_folder.py: forks that die wherever a folder changes its name.

    python folder_kill_points.py SCRATCH

It prints one JSON line: for each kill, what the destination held before and after it, what it held
after the next run, and what else lay beside it then.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from prunus.model.checkpoint import whole_folder
from prunus.model.checkpoint.lock import LOCK_NAME

RENAME, EXCHANGE = os.rename, whole_folder._exchange


def replace(dest: Path, content: str, kill_at: int | None, exchange: bool) -> None:
    """Replace `dest`, and die before event `kill_at`. The file of the new folder is event 0."""
    events = 0

    def event() -> None:
        nonlocal events
        if events == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        events += 1

    def rename(source: object, target: object) -> None:
        event()
        RENAME(source, target)
        event()

    def exchange_folders(one: Path, other: Path) -> bool:
        event()
        done = exchange and EXCHANGE(one, other)
        event()
        return done

    os.rename = rename
    whole_folder._exchange = exchange_folders
    with whole_folder.replacing_folder(dest, lambda: None) as folder:
        (folder / "half").touch()
        event()
        (folder / "half").unlink()
        (folder / "content").write_text(content)


def held(dest: Path) -> str | None:
    """The content of a whole folder; None if there is none."""
    if not dest.exists():
        return None
    # A killed run also leaves the file of its lock.
    assert set(os.listdir(dest)) - {LOCK_NAME} == {"content"}, os.listdir(dest)
    return (dest / "content").read_text()


def fork(dest: Path, content: str, kill_at: int | None, exchange: bool) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            replace(dest, content, kill_at, exchange)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(process, 0)[1]


def main() -> None:
    found = []
    for exchange in (True, False):
        for before in (None, "old"):
            for kill_at in range(10):
                scratch = Path(sys.argv[1]) / f"{exchange}-{before}-{kill_at}"
                scratch.mkdir()
                dest = scratch / "dest"
                if before is not None:
                    assert fork(dest, before, None, exchange) == 0
                status = fork(dest, "new", kill_at, exchange)
                if status == 0:
                    break
                assert os.WTERMSIG(status) == signal.SIGKILL, status
                after = held(dest)
                again = fork(dest, "newer", None, exchange)
                found.append(
                    {
                        "exchange": exchange,
                        "before": before,
                        "kill_at": kill_at,
                        "after": after,
                        "status": again,
                        "in the end": held(dest),
                        "names": sorted(os.listdir(scratch)),
                    }
                )
                shutil.rmtree(scratch)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
