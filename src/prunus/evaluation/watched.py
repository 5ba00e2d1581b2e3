"""A checkpoint must stay as it is while it is scored.

Weights are mapped into memory, so a file that is written to changes the model in the middle of the
work, and its figures would belong to no model at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.model.adapter import base_folder, is_adapter
from prunus.model.checkpoint.reader import INDEX_NAME

_NAMES = ("config.json", "adapter_config.json", INDEX_NAME)


class WatchedCheckpoint:
    """The files of a checkpoint when this object was made. Those of an adapter's base belong to it.

    Attributes:
        states: path -> size in bytes and time of the last change, of weights, index and
            configuration.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.states = _states(folder)

    def check(self) -> None:
        """Raise ValueError if a file was changed, added or removed; it names the file."""
        now = _states(self._folder)
        changed = [
            path for path in {**self.states, **now} if self.states.get(path) != now.get(path)
        ]
        if changed:
            raise ValueError(
                f"{changed[0]} was changed while the model was scored, so the figures would belong "
                "to no model. Leave the checkpoint as it is, and score it again"
            )


def _states(folder: Path) -> dict[Path, tuple[int, int]]:
    below = _states(base_folder(folder)) if is_adapter(folder) else {}
    paths = [*sorted(folder.glob("*.safetensors")), *(folder / name for name in _NAMES)]
    return below | {
        path: (state.st_size, state.st_mtime_ns)
        for path in paths
        if path.is_file() and (state := path.stat())
    }


@contextlib.contextmanager
def unchanged(
    checkpoints: Sequence[WatchedCheckpoint | None], ranks: Ranks = SINGLE_PROCESS
) -> Iterator[None]:
    """A `with` block that fails on all ranks if a checkpoint was changed meanwhile.

    None in place of a checkpoint is passed over.
    """
    watched = [each for each in checkpoints if each is not None]
    try:
        yield
    except Exception:
        # Half-written weights cause errors of many kinds. Name the cause, not its effect.
        for checkpoint in watched:
            checkpoint.check()
        raise
    with ranks.fail_together():
        for checkpoint in watched:
            checkpoint.check()
