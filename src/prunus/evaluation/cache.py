"""Results that were computed before, found again by what determines them.

An entry is a JSON file. Its name is the SHA-256 of its key, and the key holds everything that decides the figure:
the bytes of the checkpoint, the task or text, options, versions. Nothing is ever out of date; entries may be
deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.hardware.memory import describe_hardware, processor_name, versions
from prunus.model.adapter import base_folder, is_adapter
from prunus.model.checkpoint.atomic_files import file_digest, read_json, write_json
from prunus.model.checkpoint.reader import INDEX_NAME, auxiliary_files

__all__ = [
    "ResultCache",
    "checkpoint_digest",
    "default_cache_folder",
    "environment",
    "files_as_they_are",
]

# The number of threads is left out: it can change the last bit of a sum, and would make every machine start anew.
_DECISIVE = ("prunus", "torch", "transformers")


def default_cache_folder() -> Path:
    """PRUNUS_CACHE where it is set; otherwise `prunus/results` in the user's cache folder (XDG_CACHE_HOME)."""
    if place := os.environ.get("PRUNUS_CACHE"):
        return Path(place)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "prunus" / "results"


@dataclass(frozen=True)
class ResultCache:
    """A folder of results. It is made when the first one is kept."""

    folder: Path

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result kept under `key` (JSON values only), None where there is none or it is damaged."""
        try:
            entry = read_json(self._path(key))
        except (OSError, ValueError):
            return None
        if not isinstance(entry, dict) or entry.get("key") != dict(key):
            return None
        result = entry.get("result")
        return result if isinstance(result, dict) else None

    def keep(self, key: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
        """Keep a result. A cache that cannot be written must not cost the result: the reason comes back as text."""
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"key": dict(key), "result": dict(result)})
        except OSError as fault:
            return f"the result could not be kept in {self.folder}: {fault}"
        return None

    def _path(self, key: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"


def environment(device: torch.device) -> dict[str, Any]:
    """The hardware and the versions that a figure depends on, for keys."""
    return {
        "processor": processor_name(),
        "device": describe_hardware(device)["device"],
        "versions": {name: number for name, number in versions().items() if name in _DECISIVE},
    }


def checkpoint_digest(folder: Path, code: bool = False) -> str:
    """SHA-256 over the content of a checkpoint: weights, index, configuration, tokenizer; an adapter's base too.

    Names count, the folder's own does not: a copy elsewhere has the same digest. What only describes the checkpoint
    (`prunus.json`, the model card) does not count. Python files count where they may run (`code`).
    """
    files = {*folder.glob("*.safetensors"), *auxiliary_files(folder, code)}
    if (folder / INDEX_NAME).is_file():
        files.add(folder / INDEX_NAME)
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(json.dumps([path.name, file_digest(path)]).encode())
    if is_adapter(folder):
        digest.update(checkpoint_digest(base_folder(folder), code).encode())
    return digest.hexdigest()


def files_as_they_are(folder: Path) -> list[list[Any]]:
    """What stands for `checkpoint_digest` where no byte is to be read: every file's place, size and times.

    A copy elsewhere is another checkpoint then; a file that was changed in place is too, as nothing sets the time of
    its last change of status back.
    """
    found = []
    for path in sorted(
        {*folder.resolve().glob("*.safetensors"), *auxiliary_files(folder.resolve())}
    ):
        state = path.stat()
        found.append([str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns])
    return found
