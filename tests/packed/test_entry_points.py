"""Programs that never import prunus, and what its entry points do for them."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from packed_reference import pruned_checkpoint
from places import REPOSITORY
from prunus import pack
from prunus.packed import register

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


def run(code: str, installed: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = [str(installed), str(REPOSITORY / "src")]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("module", ["transformers.quantizers.auto", "peft"])
def test_a_packed_checkpoint_loads_without_an_import_of_prunus(module, installed, tmp_path):
    """The module may be what leads to the import of torch, and is then half imported."""
    if module == "peft":
        pytest.importorskip("peft")
    pack(pruned_checkpoint(tmp_path / "pruned"), tmp_path / "packed")
    done = run(f"import {module}\n{LOAD}", installed, tmp_path / "packed")
    assert done.returncode == 0, done.stderr
    assert "PackedLinear" in done.stdout


def test_a_fault_of_prunus_does_not_keep_torch_from_being_imported(monkeypatch):
    def fail() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(register, "register", fail)
    register.register_with_torch()
