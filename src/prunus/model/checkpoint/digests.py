"""The SHA-256 of every shard that a run wrote, to notice files that change afterwards.

Every record of a result holds them in its field `sha256`. They are computed while the shard is
written, from the bytes in memory. A disk that changes a bit later is therefore noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from prunus.model.checkpoint.atomic_files import file_digest, read_json

#: Records of results. A recovered or packed checkpoint also has a copy of the record of its source,
#: which describes the source's shards. So the first record that is there counts.
RECORD_FILES = (
    "prunus-pack.json",
    "prunus-unpack.json",
    "prunus-recovery.json",
    "prunus-compress.json",
    "prunus.json",
    "prunus-structure.json",
)


def recorded_digests(folder: Path) -> dict[str, str]:
    """File name of a shard -> the SHA-256 in the record of a result.

    Empty for a checkpoint that prunus did not write.
    """
    path = next((folder / name for name in RECORD_FILES if (folder / name).exists()), None)
    content = read_json(path) if path is not None else {}
    found = content.get("sha256", {}) if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
        raise ValueError(f"{path} is damaged: it maps no shards to their SHA-256; copy it again")
    return found


def check_shard(path: Path, expected: str, remedy: str) -> None:
    """Check that a shard still has the bytes that were written."""
    if file_digest(path) != expected:
        raise ValueError(
            f"{path} is not what was written: its SHA-256 is not the recorded one, so a disk or a "
            f"copy has changed it; {remedy}"
        )


def verify_shards(folder: Path) -> int:
    """Compare all shards of a checkpoint with the SHA-256 in its record.

    Returns:
        How many shards there are.
    """
    recorded = recorded_digests(folder)
    if not recorded:
        raise FileNotFoundError(
            f"{folder} has no record with the SHA-256 of its shards: prunus did not write it"
        )
    unknown = sorted({path.name for path in folder.glob("*.safetensors")} - recorded.keys())
    missing = sorted(name for name in recorded if not (folder / name).exists())
    changed = [
        name
        for name, expected in sorted(recorded.items())
        if name not in missing and file_digest(folder / name) != expected
    ]
    if missing:
        raise FileNotFoundError(f"{folder} has lost {', '.join(missing)}; copy it again")
    if changed or unknown:
        raise ValueError(
            f"{folder} is not what was written: {', '.join((*changed, *unknown))} differ from the "
            "SHA-256 in the record; copy the checkpoint again, or make it again with `overwrite`"
        )
    return len(recorded)


def fingerprint_with(fingerprint: str, recorded: Mapping[str, str]) -> str:
    """A fingerprint that also covers the weights, where their SHA-256 is known.

    >>> fingerprint_with("abc", {})
    'abc'
    >>> fingerprint_with("abc", {"a": "0"}) == fingerprint_with("abc", {"a": "1"})
    False
    """
    if not recorded:
        return fingerprint
    return hashlib.sha256(json.dumps([fingerprint, sorted(recorded.items())]).encode()).hexdigest()
