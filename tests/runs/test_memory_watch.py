"""A run that grows beyond its plan ends with a sentence, and its finished blocks are kept."""

import signal
import threading

import pytest

import prunus
from prunus.runs import loop
from prunus.runs.job import BlockMemory, RunJob
from tiny import tiny_checkpoint, token_ids


def test_a_run_beyond_its_plan_ends_before_the_system_kills_it(tmp_path, monkeypatch):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=3)
    options = {"calibration": token_ids(), "batch": 1, "method": "wanda"}
    whole = prunus.prune(dense, tmp_path / "whole", **options)
    finished = []

    def fill_the_memory(step):
        finished.append(step)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "available_memory", lambda: 0)
            patch.setattr(loop, "resident_memory", lambda: 10**15)
            threading.Event().wait(60)  # the interrupt ends it

    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_LOOKS", 0.01)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        with pytest.raises(MemoryError, match="GB were planned, and no memory is left"):
            prunus.prune(dense, tmp_path / "out", progress=fill_the_memory, **options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(finished) == 1
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    resumed = prunus.prune(dense, tmp_path / "out", resume=True, **options)
    assert resumed.sha256 == whole.sha256


def job_with(budget: int, hidden: int, paused: int) -> RunJob:
    job = object.__new__(RunJob)
    job.budget, job.block_memory = budget, [BlockMemory(10, 10, hidden, paused, 10)] * 2
    return job


def test_hidden_states_leave_memory_where_blocks_then_run_in_lockstep():
    assert job_with(200, 50, 100).hidden_states_stay
    assert not job_with(160, 50, 100).hidden_states_stay  # lockstep, with the states in a file
    assert job_with(100, 50, 100).hidden_states_stay  # no lockstep in any case
    assert not job_with(60, 50, 100).hidden_states_stay
