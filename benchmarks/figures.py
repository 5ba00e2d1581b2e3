"""What all measurements share: their list, their JSON files, and models by name.

`benchmarks/results.toml` lists the results. Each has its figures in docs/results/NAME.json, which
say of themselves by which version, when, on what and by which command they were measured.
"""

from __future__ import annotations

import datetime
import json
import textwrap
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
LIST = tomllib.loads((ROOT / "benchmarks" / "results.toml").read_text(encoding="utf-8"))
#: The version of the package in this tree; an installed one may be older.
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def load(path: Path) -> dict[str, Any]:
    """The figures of a file; none if it is not there."""
    if not path.exists():
        return {}
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return figures


def read(name: str) -> Any:
    """The figures of a result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def save(path: Path, figures: dict[str, Any], command: str, device: str = "cpu") -> None:
    """Write figures with version, date, hardware and command, whole or not at all."""
    import torch

    from prunus.hardware.machine import describe_hardware, describe_machine, versions
    from prunus.model.checkpoint.files import write_json

    hardware = describe_hardware(torch.device(device))
    said = {
        "version": VERSION,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware | {"instructions": describe_machine()["kernels"].partition(":")[0]},
        "command": command,
        "libraries": {name: each for name, each in versions().items() if name != "prunus"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, said | {key: each for key, each in figures.items() if key not in said})


def minor(version: str) -> str:
    """The part of a version whose change makes figures old.

    >>> minor("0.5.0.dev0")
    '0.5'
    """
    return ".".join(version.split(".")[:2])


def is_fresh(figures: dict[str, Any]) -> bool:
    """Whether figures are those of this minor version."""
    return minor(str(figures.get("version"))) == minor(VERSION)


def source(figures: dict[str, Any], command: str) -> str:
    """The sentence below a table: by what, when and on what it was measured."""
    hardware = figures["hardware"]
    threads = hardware["threads"]
    on = f"{hardware['processor']}, {threads} {'thread' if threads == 1 else 'threads'}"
    how = (
        f"`{command}`" if is_fresh(figures) else f"**an older version**; `{command}` runs it again"
    )
    return textwrap.fill(f"prunus {figures['version']}, {figures['date']}, {on}: {how}.", 100)


def weight_bytes(path: Path) -> int:
    """Bytes of a file, or of the files with weights in a folder."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def checkpoint(model: str, models: Path) -> Path:
    """The folder of a model, by what tables call it.

    Raises:
        FileNotFoundError: It is not there; the message says how to make it.
    """
    name = LIST["models"][model]
    folder = models / name
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"there is no {folder}: python benchmarks/fetch_model.py {name} {name}.gguf; "
            f"python benchmarks/dither.py {name}.gguf {folder}"
        )
    return folder
