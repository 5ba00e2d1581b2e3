"""What `prunus --version` says of the machine."""

import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from command_line import call
from prunus.hardware import machine
from prunus.kernels import library


def test_version_says_what_counts_on_this_machine():
    lines = dict(line.split(" ", 1) for line in call("--version").stdout.splitlines())
    assert [*lines] == [
        *("prunus", "python", "processor", "kernels", "torch", "transformers", "gguf", "CUDA")
    ]
    assert (lines["prunus"], lines["torch"]) == (version("prunus"), version("torch"))
    if (opened := library.load()) is not None:
        assert lines["kernels"] == library.ISAS[opened.isa]


@pytest.mark.parametrize("isa", ["off", "sse9"])
def test_version_says_why_there_are_no_kernels(isa, monkeypatch):
    monkeypatch.setenv("PRUNUS_ISA", isa)
    said = {"off": "switched off by PRUNUS_ISA=off", "sse9": "there is no instruction set 'sse9'"}
    assert f"kernels none: {said[isa]}" in call("--version").stdout


def test_cuda_is_named_and_what_is_not_installed_is_said(monkeypatch):
    versions = {"torch": "2.13.0", "gguf": "not installed"}
    monkeypatch.setattr(machine, "installed_version", lambda name: versions.get(name, "1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    said = machine.describe_machine()
    assert (said["gguf"], said["CUDA"]) == ("not installed", "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.describe_machine()["CUDA"] == "no"
    monkeypatch.undo()
    assert machine.installed_version("no-such-package-of-anybody") == "not installed"


def test_version_is_quick():
    """In a process of its own: a torch without CUDA is not imported, which takes seconds."""
    script = """
import sys
from prunus.hardware import machine
machine.installed_version = lambda name: "2.13.0+cpu"
assert machine.describe_machine()["CUDA"] == "no"
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
