"""A folder that is replaced as a whole: kills between any two steps, errors, other file systems."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prunus.model.checkpoint import whole_folder
from prunus.model.checkpoint.whole_folder import replacing_folder
from scripts import run_script


def write(dest: Path, content: str) -> None:
    with replacing_folder(dest, lambda: None) as folder:
        (folder / "content").write_text(content)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path):
    kills = run_script("folder_kill_points.py", tmp_path)
    fallback = [kill for kill in kills if not kill["exchange"] and kill["before"]]
    exchanged = [kill for kill in kills if kill["exchange"] and kill["before"]]
    fresh = [kill for kill in kills if kill["before"] is None]
    assert {kill["after"] for kill in exchanged} == {"old", "new"}, "never nothing"
    assert {kill["after"] for kill in fresh} == {None, "new"}
    # Without an exchange there are two renames, and nothing between them.
    assert {kill["after"] for kill in fallback} == {"old", "new", None}
    for kill in kills:
        assert kill["status"] == 0, kill
        assert kill["in the end"] == "newer", kill
        assert kill["names"] == ["dest"], kill


def test_the_old_folder_comes_back_before_the_next_run_does_anything(monkeypatch, tmp_path):
    """A kill between two renames left the old folder aside."""
    write(tmp_path / "dest", "old")
    staging = tmp_path / ".dest.import.partial"
    staging.mkdir()
    (tmp_path / "dest").rename(staging / "old")

    class StopError(Exception):
        pass

    with pytest.raises(StopError), replacing_folder(tmp_path / "dest", lambda: None):
        raise StopError
    assert (tmp_path / "dest" / "content").read_text() == "old"
    assert os.listdir(tmp_path) == ["dest"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failed_rename_leaves_the_old_folder(exchange, monkeypatch, tmp_path):
    write(tmp_path / "dest", "old")
    rename = os.rename

    def fail_on_new(source, target):
        if Path(source).name == "new":
            raise OSError("no")
        rename(source, target)

    def no_exchange(one, other):
        if exchange:
            raise OSError("no")
        return False

    monkeypatch.setattr(os, "rename", fail_on_new)
    monkeypatch.setattr(whole_folder, "_exchange", no_exchange)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "dest", "new")
    assert (tmp_path / "dest" / "content").read_text() == "old"
    assert os.listdir(tmp_path) == ["dest"]


def test_the_working_folder_can_be_named_by_a_dot(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(Path(), "new")
    assert (tmp_path / "here" / "content").read_text() == "new"
