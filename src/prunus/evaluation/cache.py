"""A cache of evaluation results, addressed by everything that determines them.

An entry is a JSON file. Its name is the SHA-256 of its key. The key holds all inputs of the result:
the bytes of the checkpoint, the task or text, the options and the versions.

Results are addressed by content and not by path for two reasons. A copied or renamed checkpoint
finds its results again, and a checkpoint that was changed in place does not find stale ones. An
entry is therefore never out of date, and you may delete any entry at any time.
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
from prunus.model.checkpoint.companions import auxiliary_files
from prunus.model.checkpoint.reader import INDEX_NAME

__all__ = [
    "ResultCache",
    "checkpoint_digest",
    "default_cache_folder",
    "environment",
    "file_states",
    "ids_digest",
]

#: Packages whose versions are part of a key.
_KEY_VERSIONS = ("prunus", "torch", "transformers")


def default_cache_folder() -> Path:
    """The folder in PRUNUS_CACHE if it is set, else `prunus/results` in the user's cache folder.

    The user's cache folder is the one in XDG_CACHE_HOME, or `~/.cache`.
    """
    if folder := os.environ.get("PRUNUS_CACHE"):
        return Path(folder)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "prunus" / "results"


@dataclass(frozen=True)
class ResultCache:
    """A folder of results. The first `put` creates it.

    >>> import tempfile
    >>> cache = ResultCache(Path(tempfile.mkdtemp()))
    >>> cache.get({"task": "rte", "limit": 10}) is None
    True
    >>> cache.put({"task": "rte", "limit": 10}, {"acc": 0.5})
    >>> cache.get({"limit": 10, "task": "rte"})
    {'acc': 0.5}
    """

    folder: Path

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Look up the result of `key`.

        Args:
            key: everything that determines the result, as JSON values. The order does not matter.

        Returns:
            The result, or None if there is none, its file is damaged, or other users can write the
            file or its folder. What they can write they can invent.
        """
        path = self._path(key)
        try:
            if not all(map(_is_own, (self.folder, path.parent, path))):
                return None
            entry = read_json(path)
        except (OSError, ValueError):
            return None
        # The whole key is compared: a damaged file must not pass for a result.
        if not isinstance(entry, dict) or entry.get("key") != dict(key):
            return None
        result = entry.get("result")
        return result if isinstance(result, dict) else None

    def put(self, key: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
        """Write a result.

        Returns:
            None, or a message if the cache cannot be written. This is no exception, because the
            result itself is fine and may have taken hours.
        """
        path = self._path(key)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            if not all(map(_is_own, (self.folder, path.parent))):
                return (
                    f"the result is not kept, because other users can write the cache "
                    f"{self.folder}: chmod -R go-w it, or give another folder in PRUNUS_CACHE"
                )
            write_json(path, {"key": dict(key), "result": dict(result)})
        except OSError as fault:
            return f"the result could not be written to the cache {self.folder}: {fault}"
        return None

    def _path(self, key: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"


def _is_own(path: Path) -> bool:
    """Whether nobody but this user, and the administrator, can write a file or folder.

    On systems without POSIX permissions every path counts as the user's own.
    """
    if not hasattr(os, "getuid"):
        return True
    state = path.stat()
    return state.st_uid in (os.getuid(), 0) and not state.st_mode & 0o022


def environment(device: torch.device) -> dict[str, Any]:
    """The processor, the device and the versions on which a result depends, as part of a key.

    The number of threads is not in it. It can change the last bit of a sum, but with it in the key
    the cache would be of no use on another number of threads.
    """
    return {
        "processor": processor_name(),
        "device": describe_hardware(device)["device"],
        "versions": {name: number for name, number in versions().items() if name in _KEY_VERSIONS},
    }


def checkpoint_digest(folder: Path, code: bool = False) -> str:
    """SHA-256 of a checkpoint's content: weights, index, configuration, tokenizer, adapter base.

    File names are part of the digest, the folder's own name is not: a copy in another folder has
    the same digest. Files that only describe the checkpoint (`prunus.json`, the model card) are not
    part of it.

    Args:
        folder: the checkpoint.
        code: include Python files, because they may run.
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


def file_states(folder: Path) -> list[list[Any]]:
    """Path, size in bytes and times of every file, for checkpoints that are too large to hash.

    A copy in another folder counts as another checkpoint. A file that was changed in place does
    too: no program can set back the time of the last status change (ctime).
    """
    found = []
    for path in sorted(
        {*folder.resolve().glob("*.safetensors"), *auxiliary_files(folder.resolve())}
    ):
        state = path.stat()
        found.append([str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns])
    return found


def ids_digest(ids: torch.Tensor) -> list[Any]:
    """Shape of token ids, and the SHA-256 of their bytes."""
    return [list(ids.shape), hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()]
