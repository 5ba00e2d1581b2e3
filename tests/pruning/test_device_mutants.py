"""Faults of device code are found by the tests that run on pretend devices."""

from __future__ import annotations

import os

import pytest

import pretend_cuda
from device_mutants import MUTANTS
from scripts import run_fresh_script

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="faults are tried in forks")

#: A tensor on the processor, and a copy that nobody waits for.
SOME = ("sums of squares", "integers that nobody waits for")


def caught(scratch, names) -> dict[str, bool]:
    if reason := pretend_cuda.why_not():
        pytest.skip(reason)
    return run_fresh_script("device_mutants.py", scratch, *names)


def test_faults_are_caught_and_a_sound_copy_passes(tmp_path):
    assert caught(tmp_path, ("none", *SOME)) == {"none": False, **dict.fromkeys(SOME, True)}


@pytest.mark.slow
def test_every_fault_is_caught(tmp_path):
    found = caught(tmp_path, ["all"])
    assert not found.pop("none")
    assert len(found) == len(MUTANTS) - 1
    assert all(found.values()), [name for name, was_caught in found.items() if not was_caught]
