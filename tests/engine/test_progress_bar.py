"""The progress bar of functions that are called from Python."""

import contextlib
import io
import sys
from types import SimpleNamespace

import pytest

import prunus
from prunus.engine.progress import Progress, Shown, shows_progress
from tiny import token_ids


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@shows_progress("count", lambda done, total: Shown(done / total, f"{done} of {total}"))
def count(progress=True):
    """Returns what it got, after two steps."""
    for done in (1, 2):
        if progress is not None:
            progress(done, 2)
    return progress


@pytest.fixture
def notebook(monkeypatch, capfd):
    """A notebook without widgets, where bars are lines of text: reads what is new on them."""
    fake = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object(), config={}))
    monkeypatch.setitem(sys.modules, "IPython", fake)
    return lambda: capfd.readouterr().err


def test_nothing_is_printed_where_nobody_looks(capfd):
    assert count() is None
    with contextlib.redirect_stderr(None):
        assert count() is None
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert callable(count())
    assert "count" in terminal.getvalue() and "2 of 2" in terminal.getvalue()


def test_false_and_none_show_nothing_and_a_function_is_called_as_before(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert count(progress=False) is None and count(progress=None) is None
    steps = []

    def own(*step):
        steps.append(step)

    assert count(progress=own) is own and steps == [(1, 2), (2, 2)]
    assert not terminal.getvalue()


def test_other_ranks_show_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("prunus.distributed.is_rank_0", lambda: False)
    assert count() is None


def test_a_notebook_gets_one_bar_that_changes_and_ends_full(notebook):
    count()
    first, *_, last = notebook().strip().split("\r")
    assert first.startswith("count 0%") and last.startswith("count 100%") and "2 of 2" in last


def test_a_console_of_ipython_is_a_terminal(monkeypatch):
    console = SimpleNamespace(get_ipython=SimpleNamespace)  # has no kernel
    monkeypatch.setitem(sys.modules, "IPython", console)
    assert count() is None


def test_pruning_and_scoring_show_their_steps(dense, notebook, tmp_path):
    prunus.prune(dense, tmp_path / "out", calibration=token_ids(2))
    shown = notebook()
    assert "100%" in shown and "2/2 blocks; left 0:00; peak" in shown
    steps: list[object] = []
    prunus.prune(dense, tmp_path / "b", calibration=token_ids(2), progress=steps.append)
    assert all(isinstance(step, Progress) for step in steps) and len(steps) == 2
    prunus.prune(dense, tmp_path / "c", calibration=token_ids(2), progress=False)
    assert "%" not in notebook()


def test_a_resumed_run_says_what_is_kept_and_how_long_the_rest_takes(dense, tmp_path):
    """A minute before the blocks, or blocks that are only read, must not count as if made."""
    steps, told = [], []

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prunus.prune(dense, tmp_path / "out", calibration=token_ids(2), progress=stop)
    record = prunus.Manifest.load(tmp_path / "out")
    record.blocks[0].seconds = 100.0
    record.save(tmp_path / "out")
    how = {"progress": steps.append, "announce": told.append}
    prunus.prune(dense, tmp_path / "out", calibration=token_ids(2), **how)
    assert any("1 of 2 blocks are kept from the earlier run; the others take about 100 s" in x
               for x in told)  # fmt: skip
    assert [round(step.left) for step in steps] == [100, 0]
