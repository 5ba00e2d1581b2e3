"""Reading ahead and writing behind change nothing but the time."""

import threading

import pytest
import torch

import prunus
from prunus.engine.block_memory import Memory
from prunus.engine.loop import background_writes, read_ahead
from tiny import shards, tiny_checkpoint, token_ids


def test_the_next_is_read_while_one_is_used():
    started = {index: threading.Event() for index in range(4)}

    def read(index):
        started[index].set()
        return index

    blocks = read_ahead(range(4), read, overlaps=True)
    assert next(blocks) == 0
    # Nobody asked for it yet.
    assert started[1].wait(timeout=30)
    assert not started[2].is_set()
    assert list(blocks) == [1, 2, 3]


def test_writes_keep_their_order_and_never_run_together():
    order, running = [], threading.Lock()

    def write(number):
        assert running.acquire(blocking=False)
        assert not torch.is_grad_enabled()
        order.append(number)
        running.release()

    with torch.no_grad(), background_writes(overlaps=True) as submit:
        for number in range(20):
            submit(lambda number=number: write(number))
    assert order == list(range(20))


def test_the_last_write_is_finished_if_the_run_fails():
    release, done = threading.Event(), []

    def write():
        assert release.wait(timeout=30)
        done.append(True)

    def run():
        with background_writes(overlaps=True) as submit:
            submit(write)
            threading.Timer(0.05, release.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert done == [True]


@pytest.mark.parametrize("last", [True, False])
def test_an_error_of_writing_ends_the_run(last):
    def fail():
        raise OSError("no space left on device")

    def run():
        with background_writes(overlaps=True) as submit:
            submit(fail)
            if not last:
                submit(lambda: None)

    with pytest.raises(OSError, match="no space left"):
        run()


def test_the_bytes_are_those_of_a_run_without_overlap(tmp_path, monkeypatch):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16, num_hidden_layers=4)
    for name, overlaps in (("with", True), ("without", False)):
        monkeypatch.setattr(Memory, "overlaps", property(lambda _plan, value=overlaps: value))
        prunus.prune(dense, tmp_path / name, calibration=token_ids())
    assert len(shards(tmp_path / "with")) > 1
    assert shards(tmp_path / "with") == shards(tmp_path / "without")


@pytest.mark.parametrize("plenty", [True, False])
def test_freed_memory_is_kept_if_there_is_plenty_and_returned_after_each_block_if_not(
    plenty, tmp_path, monkeypatch
):
    calls = []
    returns = "return_freed_memory"
    for module, name in (("command", "keep_freed_memory"), ("command", returns), ("loop", returns)):
        monkeypatch.setattr(f"prunus.engine.{module}.{name}", lambda name=name: calls.append(name))
    if not plenty:
        monkeypatch.setattr(Memory, "peak_bytes", lambda memory: memory.host_budget)
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=3)
    prunus.prune(dense, tmp_path / "out", calibration=token_ids(), method="magnitude")
    assert calls == (["keep_freed_memory", returns] if plenty else 4 * [returns])
