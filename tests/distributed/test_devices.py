"""Ranks with a CUDA device each: what travels stays on devices, and no two ranks share one."""

import os
from pathlib import Path

import pytest

import pretend_cuda
from scripts import run_fresh_script

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked here")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(scratch):
    if reason := pretend_cuda.why_not():
        pytest.skip(reason)
    return run_fresh_script("device_ranks.py", scratch)


def test_two_ranks_prune_on_two_devices_as_on_the_processor(found, scratch):
    assert all(status == [0, 0] for status in found["runs"].values()), found["runs"]
    for name in ("wanda", "alps, reconstructed"):
        expected = sorted((scratch / f"{name} cpu").glob("*.safetensors"))
        assert expected
        for path in expected:
            other = scratch / f"{name} cuda" / path.name
            assert path.read_bytes() == other.read_bytes(), (name, path.name)


def test_device_tensors_arrive_on_the_device_of_each_rank(found):
    for rank, received in enumerate(found["messages"]):
        assert received == {
            "sum": [[3.0] * 3] * 2,
            "sent": [1.0] * 3,
            "rows": [0, 0, 1],
            "host": [2.0] * 2,
            "devices": [f"cuda:{rank}"],
            "texts": ["", "x" * 300],
            "floats": [1.0],
        }


def test_ranks_that_would_share_a_device_are_refused_before_any_work(found):
    for error in found["refused"]["too many"]:
        assert "there are 3 processes on this host and 2 CUDA devices" in error
        assert "start 2 with --nproc-per-node" in error
    for error in found["refused"]["one for all"]:
        assert "device 'cuda:0' would be shared by the 2 processes on this host" in error
