"""What tests of smaller models share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from prunus.pruning.structure.record import StructureRecord
from prunus.pruning.structure.run import shrink

#: Most tests look at what goes, and not at what is trained afterwards.
shrink_without_repair = functools.partial(shrink, repair=False)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The files of a result that must not depend on how often the run was stopped."""
    names = [*folder.glob("*.safetensors"), folder / "config.json"]
    return {path.name: path.read_bytes() for path in names}


class Killed(BaseException):
    pass


def shrunk_with_a_kill(dense: Path, output: Path, after: int, **options: Any) -> None:
    """Stop a run after some steps, then give the same command again."""
    seen: list[Any] = []
    options = {"repair": False, **options}

    def kill(step: Any) -> None:
        seen.append(step)
        if len(seen) == after:
            raise Killed

    with pytest.raises(Killed):
        shrink(dense, output, progress=kill, **options)
    assert StructureRecord.load(output).state == "running"
    assert not (output / "model.safetensors.index.json").exists()
    shrink(dense, output, resume=True, **options)


def shrink_killed_in_second_step(
    monkeypatch: pytest.MonkeyPatch, module: Any, step: str, *args: Any, **options: Any
) -> None:
    """Call `shrink`, and kill it when the search of `module` calls its function `step` again.

    One step of the search is then recorded in the folder of the result.
    """
    original, calls = getattr(module, step), []

    def kill(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, step, kill)
        with pytest.raises(Killed):
            shrink_without_repair(*args, **options)
