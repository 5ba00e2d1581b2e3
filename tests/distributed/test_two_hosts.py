"""torchrun on two hosts: two network namespaces of one machine, joined by a virtual cable."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunus
from prunus.pruning.manifest import Manifest
from ranks import free_port
from scripts import run_script
from tiny import block_shards, tiny_checkpoint, token_ids


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
    ids = tmp_path / "ids.safetensors"
    save_file({"input_ids": token_ids()}, ids)
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
