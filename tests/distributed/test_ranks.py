"""Several processes prune as one does, and none waits for ever for a lost one.

Also on two hosts.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import prunus
from prunus.distributed import SINGLE_PROCESS, is_rank_0, process_group, split_range
from prunus.model.device import choose_device
from prunus.pruning.manifest import Manifest
from ranks import free_port
from scripts import run_script
from tiny import block_shards, ids_file, tiny_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked here")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    cases = ["methods", "compressed", "shrunk", "messages", "uneven", "refused", "lost"]
    cases += ["evaluated", "recovered", "reconstructed"]
    return run_script("rank_cases.py", tmp_path_factory.mktemp("ranks"), *cases, timeout=300)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "3 processes on this host and 2 CUDA devices, .*start 2 with --nproc-per-node"),
        ("cuda:0", "device 'cuda:0' would be shared by the 3 processes on this host"),
        ("cuda:2", "device 'cuda:2' is not there: 2 CUDA devices are visible"),
    ],
)
def test_ranks_that_would_share_a_device_are_refused(device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("prunus.model.device.ranks", lambda: SimpleNamespace(local_size=3))
    with pytest.raises(ValueError, match=message):
        choose_device(device)


@pytest.mark.parametrize("name", ["wanda", "two passes", "allocation", "owl"])
def test_methods_that_need_norms_give_the_same_bytes(found, name):
    assert found["methods"][name] == {"masks": 0.0, "weights": 0.0, "bytes": True}


@pytest.mark.parametrize("name", ["sparsegpt 2:4", "obs", "alps, dense targets", "least squares"])
def test_methods_that_need_a_gram_matrix_are_equal_within_rounding(found, name):
    assert found["methods"][name]["masks"] <= 1e-3
    assert found["methods"][name]["weights"] < 0.05


def test_ranks_compress_to_the_same_bits_and_errors(found):
    """Sums over ranks differ in their last bits, and a step that is rounded otherwise moves many
    integers. So results are alike, not equal; with the same ranks they are equal.
    """
    result = found["compressed"]
    assert len({*result["bits"].values()}) == 1, "rank 0 measures and chooses"
    errors = result["errors"]
    assert errors["two"] == pytest.approx(errors["one"], rel=0.05)
    assert errors["resumed"] == pytest.approx(errors["one"], rel=0.05)
    assert result["again"]
    assert result["kept"]
    assert not result["left"]


def test_models_become_smaller_as_by_one_process(found):
    result = found["shrunk"]
    assert result["chosen"] and result["resumed"], "the same bytes"
    # Sums over ranks differ in their last bits, and so do weights that are fitted or trained.
    one, two = result["one"], result["two"]
    assert one["blocks"] == two["blocks"]
    assert one["errors"] == pytest.approx(two["errors"], rel=0.01)


def test_ranks_receive_texts_and_sums_and_rank_0_works_alone(found):
    received = {"same": True, "totals": [3.0, 1.5], "rows": [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]}
    received["sizes"] = [1, 3, 3, 1]
    assert [*found["messages"].values()] == [received] * 3


def test_uneven_shares_and_ranks_without_windows(found):
    walks = {"lockstep", "replay", "two_pass"}
    assert set(found["uneven"]) == {"5 windows on 3", "2 windows on 3"} | walks
    assert all(case["bytes"] for case in found["uneven"].values())


@pytest.mark.parametrize("name", ["one window per step", "more ranks than windows"])
def test_steps_of_one_window_are_those_of_one_process(found, name):
    result = found["reconstructed"][name]
    assert result["bytes"]
    assert sum(result["several"]) < sum(result["before"]), "training lowered the error"


@pytest.mark.parametrize(
    "name", ["split", "split, best, 2:4", "split, experts", "last only, one batch in four"]
)
def test_blocks_are_reconstructed_as_well_as_by_one_process(found, name):
    result = found["reconstructed"][name]
    assert result["several"] == pytest.approx(result["alone"], rel=0.1)
    # Other rounding in the first block changes the masks of ALPS and the routing in the second.
    assert result["masks"] <= (1e-3 if name == "split" else 1e-2)
    assert sum(result["several"]) < sum(result["before"])
    if name == "last only, one batch in four":
        assert result["steps"] == [0, 2 * 5], "six of 21 batches are dense, five are trained on"


def test_a_rank_lost_in_training_ends_the_others_and_another_number_goes_on(found):
    result = found["reconstructed"]["killed"]
    assert "another rank is lost" in result["messages"]
    assert result["blocks"] == 1
    assert result["bytes"]


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("original", "`propagate` block keeps"),
        ("other options", "rank 1 has another recipe than rank 0"),
    ],
)
def test_a_run_that_ranks_cannot_split_is_refused_before_any_work(found, case, says):
    first, second = found["refused"][case]["errors"]
    assert not found["refused"][case]["left"]
    assert first.startswith("ValueError")
    assert says in first
    assert second.startswith("OtherRankError")


@pytest.mark.parametrize("case", ["killed", "stopped", "error"])
def test_a_lost_rank_ends_the_others_and_the_run_goes_on_without_it(found, case):
    result = found["lost"][case]
    for message, seconds, kind in result["messages"]:
        assert kind == "RankError"
        assert message.startswith("another rank is lost: ")
        assert "this rank was at model.layers." in message
        assert seconds < 15, "a rank timeout of 3 s, on a machine that may be busy"
    assert result["blocks"] == 2
    assert not any(result["status"])
    assert result["bytes"], "norms add up in one order whatever the number of ranks"


def test_perplexity_is_the_same_to_the_last_digit(found):
    losses = found["evaluated"]
    assert losses["2"] == [losses["alone"]] * 2
    assert losses["3"] == [losses["alone"]] * 3


def test_divergence_is_the_same_to_the_last_digit(found):
    alone, *others = found["evaluated"]["compared"]
    assert alone["kl"] > 0
    assert len(others) == 2 + 3
    assert all(other == alone for other in others)


def test_a_training_step_is_split_over_ranks(found):
    result = found["recovered"]
    assert result["state"] == "finished"
    assert len(result["alone"]) == 3
    assert result["both"] == pytest.approx(result["alone"], rel=1e-5)
    assert result["alone"][-1] != result["alone"][0], "training lowered the error"
    assert result["masks"] == 0
    assert "raise it to 2 or more" in result["refused"]
    assert not result["left"]


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 7))
def test_shares_are_whole_in_order_and_even(count, size, together):
    parts = split_range(count, size, together)
    assert [x for part in parts for x in part] == list(range(count))
    assert all(part.start % together == 0 or not part for part in parts)
    runs = [-(-len(part) // together) for part in parts]
    assert max(runs) - min(runs) <= 1


@pytest.mark.parametrize("rank", [None, "1", "node7", "", "-1", "é", "9" * 30])
def test_without_torchrun_there_is_one_rank(rank, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    if rank is not None:  # a rank alone is no torchrun
        monkeypatch.setenv("RANK", rank)
    with process_group() as ranks:
        assert ranks is SINGLE_PROCESS
    with pytest.raises(ValueError, match="rank timeout"), process_group(0):
        pass
    assert is_rank_0()


# --- two hosts ---


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def _hosts(name: str) -> Iterator[list[tuple[str, str, str]]]:
    """Two hosts (namespace, device, address) that reach each other and nothing else."""
    hosts = [(f"{name}{i}", f"{name}v{i}", f"10.213.77.{i + 1}") for i in range(2)]
    try:
        for space, _, _ in hosts:
            _ip("netns", "add", space)
        _ip("link", "add", hosts[0][1], "type", "veth", "peer", "name", hosts[1][1])
        for space, device, address in hosts:
            _ip("link", "set", device, "netns", space)
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", device)
            _ip("-n", space, "link", "set", device, "up")
            _ip("-n", space, "link", "set", "lo", "up")
        yield hosts
    finally:
        for space, _, _ in hosts:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


def test_torchrun_on_two_hosts_prunes_as_one_process_does(tmp_path):
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip for network namespaces")
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16)
    ids = ids_file(tmp_path / "ids.safetensors")
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(_hosts(f"pr{os.getpid() % 100000}"))
        except subprocess.CalledProcessError as fault:
            pytest.skip(f"this machine allows no network namespaces: {fault.stderr.strip()}")
        command = ["prune", dense, tmp_path / "out", "--method", "sparsegpt", "--calibration", ids]
        command += ["--samples", 6, "--seqlen", 16, "--batch", 1, "--rank-timeout", 120]
        names = [f"{space}:{device}" for space, device, _ in hosts]
        place = (free_port(), hosts[0][2], tmp_path / "said")
        status = run_script("two_hosts.py", *place, *names, *command, timeout=240)
    said = [(tmp_path / f"said{node}").read_text() for node in range(2)]
    assert status == [0, 0], said
    assert "linear" in said[0], "rank 0 shows the table"
    assert "linear" not in said[1], "and nobody else does"
    alone = prunus.prune(
        dense, tmp_path / "one", "sparsegpt", calibration=str(ids), samples=6, seqlen=16, batch=1
    )
    both = Manifest.load(tmp_path / "out")
    for path in block_shards(tmp_path / "one"):
        left, right = load_file(path), load_file(tmp_path / "out" / path.name)
        differ = sum(int(((left[k] == 0) != (right[k] == 0)).sum()) for k in left)
        assert differ <= 1e-3 * sum(x.numel() for x in left.values())
    assert alone.blocks[0].ranks == 1
    assert both.blocks[0].ranks == 2
