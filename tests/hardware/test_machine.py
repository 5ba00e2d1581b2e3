"""What `prunus --version` says of the machine, and the memory figures of this process."""

import platform
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from command_line import call
from prunus.hardware import machine
from prunus.hardware.machine import (
    keep_freed_memory,
    peak_memory,
    process_memory,
    return_freed_memory,
)
from prunus.kernels import library
from prunus.words import parse_bytes


def test_version_says_what_counts_on_this_machine():
    lines = dict(line.split(" ", 1) for line in call("--version").stdout.splitlines())
    assert [*lines] == [
        *("prunus", "python", "processor", "kernels", "torch", "transformers", "gguf", "CUDA")
    ]
    assert (lines["prunus"], lines["torch"]) == (version("prunus"), version("torch"))
    if (opened := library.load_kernels()) is not None:
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


# --- memory ---


def test_the_peak_is_at_least_what_is_resident():
    resident = process_memory()
    # The system updates the resident size a few pages late.
    assert peak_memory() > 0.95 * resident > 0


#: Starts a program, `argv[1]`, while it holds a gigabyte.
LARGE = """
import subprocess, sys
held = bytearray(2**30)
held[::4096] = b"x" * 2**18
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
#: Prints its peak. Then it frees every second of many pieces. The pieces in between keep the heap
#: from shrinking itself.
FRAGMENT = """
from prunus.hardware.machine import peak_memory, process_memory, return_freed_memory
print(peak_memory(), flush=True)
before = process_memory()
pieces = [bytearray(b"x") * 50_000 for _ in range(3 * before // 50_000)]
kept = pieces[1::2]
del pieces
grown = process_memory()
return_freed_memory()
assert len(kept) * 50_000 < process_memory() < grown - before
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator, and /proc")
def test_the_peak_is_not_that_of_the_process_that_started_this_one_and_a_grown_heap_is_trimmed():
    """In a process of its own, because three times the memory of a long test run is gigabytes."""
    command = [sys.executable, "-c", LARGE, FRAGMENT]
    assert 0 < int(subprocess.check_output(command, text=True)) < 3 * 2**28


#: Prints the page faults of some large temporaries: at first, and if freed memory is kept after
#: another thread has had as much.
TEMPORARIES = """
import resource, threading, torch
from prunus.hardware.machine import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(10_000_000).add(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
keep_freed_memory()
thread = threading.Thread(target=torch.zeros, args=(30_000_000,))
thread.start()
thread.join()
print(first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_kept_memory_costs_no_page_faults_again_also_in_another_thread():
    """In a process of its own, because the choice holds until the process ends."""
    command = [sys.executable, "-c", TEMPORARIES]
    first, kept = map(int, subprocess.check_output(command, text=True).split())
    assert kept < first / 100


@pytest.mark.parametrize("change", [keep_freed_memory, return_freed_memory])
def test_a_c_library_without_the_calls_of_glibc_is_left_as_it_is(change, monkeypatch):
    asked = []

    class Other:
        def __getattr__(self, name):
            asked.append(name)
            raise AttributeError(name)

    monkeypatch.setattr("ctypes.CDLL", lambda name: Other())
    assert change() is None
    assert len(asked) == 1


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "GB", "8388608TB"])
def test_a_size_beyond_any_memory_is_refused(text):
    with pytest.raises(ValueError, match="no computer has this much memory"):
        parse_bytes(text)
