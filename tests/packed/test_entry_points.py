"""Programs that never import prunus, and what its entry points do for them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from packed_reference import pruned_checkpoint
from places import REPOSITORY
from prunus.packed import pack

LOAD = """
import sys
from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM.from_pretrained(sys.argv[1]))
"""


@pytest.fixture
def installed(tmp_path) -> Path:
    """A folder with the entry points of pyproject.toml, as an installation writes them."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    home = tmp_path / "installed" / "prunus-0.dist-info"
    home.mkdir(parents=True)
    (home / "METADATA").write_text("Metadata-Version: 2.1\nName: prunus\nVersion: 0\n")
    (home / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return home.parent


def load(folder: Path, installed: Path, autoload: str) -> subprocess.CompletedProcess[str]:
    path = [str(installed), str(REPOSITORY / "src")]
    return subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(path), "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_packed_checkpoint_loads_without_an_import_of_prunus(installed, tmp_path):
    pack(pruned_checkpoint(tmp_path / "pruned"), tmp_path / "packed")
    done = load(tmp_path / "packed", installed, "1")
    assert done.returncode == 0, done.stderr
    assert "BitmapLinear" in done.stdout
    # Where torch does not call entry points, the error says what to do.
    done = load(tmp_path / "packed", installed, "0")
    assert done.returncode != 0
    assert "then import prunus before loading it" in done.stderr
