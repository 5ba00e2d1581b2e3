"""What `prunus --version` says of the machine."""

import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from command_line import call
from prunus.kernels import library, machine


def test_version_says_what_counts_on_this_machine():
    lines = dict(line.split(" ", 1) for line in call("--version").stdout.splitlines())
    assert [*lines] == [
        *("prunus", "python", "processor", "kernels", "torch", "transformers", "gguf", "CUDA")
    ]
    assert (lines["prunus"], lines["torch"]) == (version("prunus"), version("torch"))
    if (opened := library.load()) is not None:
        assert lines["kernels"] == library.ISAS[opened.isa]


@pytest.mark.parametrize(
    ("isa", "said"),
    [
        ("portable", "portable"),
        ("off", "none: switched off by"),
        ("sse9", "none: there is no "),
    ],
)
def test_version_says_why_there_are_no_kernels(isa, said, monkeypatch):
    monkeypatch.setenv("PRUNUS_ISA", isa)
    assert f"kernels {said}" in call("--version").stdout


def test_the_processor_is_named_where_linux_names_it(tmp_path):
    about = tmp_path / "cpuinfo"
    assert machine._processor(about) == machine.platform.machine()
    about.write_text("processor\t: 0\nmodel name\t: Fast CPU\nprocessor\t: 1\nmodel name\t: B\n")
    assert machine._processor(about).endswith(" (Fast CPU)")


def test_cuda_is_named_and_what_is_not_installed_is_said(monkeypatch):
    versions = {"torch": "2.13.0", "gguf": "not installed"}
    monkeypatch.setattr(machine, "_version", lambda name: versions.get(name, "1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    said = machine.describe()
    assert (said["gguf"], said["CUDA"]) == ("not installed", "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.describe()["CUDA"] == "no"
    monkeypatch.undo()
    assert machine._version("no-such-package-of-anybody") == "not installed"


def test_version_is_quick():
    """In a process of its own: a torch without CUDA is not imported, which takes seconds."""
    script = """
import sys
from prunus.kernels import machine
machine._version = lambda name: "2.13.0+cpu"
assert machine.describe()["CUDA"] == "no"
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
