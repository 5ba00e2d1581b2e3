"""The memory figures of this process, and freed memory that returns to the system."""

import platform
import subprocess
import sys

import pytest

from prunus.hardware.memory import peak_memory, process_memory
from prunus.hardware.sizes import parse_bytes


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
from prunus.hardware.memory import peak_memory, process_memory, return_freed_memory
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


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "GB", "8388608TB"])
def test_a_size_beyond_any_memory_is_refused(text):
    with pytest.raises(ValueError, match="no computer has this much memory"):
        parse_bytes(text)
