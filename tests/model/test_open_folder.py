"""A folder is opened once in a command, whoever asks for its configuration or its headers."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from command_line import call
from prunus.model.checkpoint import files, tensor_files
from tiny_tokenizer import dense_checkpoint


@pytest.mark.parametrize("command", ["eval", "prune"])
def test_a_command_reads_the_configuration_and_the_headers_of_a_folder_once(
    command, tmp_path, monkeypatch
):
    dense, other, text = (
        dense_checkpoint(tmp_path / "dense"),
        tmp_path / "other",
        tmp_path / "a.txt",
    )
    shutil.copytree(dense, other)
    text.write_text("a text of some words, " * 200)
    # Two folders must not be the same file to the counter.
    content = (other / "config.json").read_text()
    (other / "config.json").write_text(content + " ")
    parsed, opened = Counter[str](), Counter[str]()
    contents = {(x / "config.json").read_text(): x.name for x in (dense, other)}
    loads, safe_open = json.loads, tensor_files.safe_open

    def counted(text, *args, **options):
        if sys._getframe(1).f_code.co_filename == files.__file__ and text in contents:
            parsed[contents[text]] += 1
        return loads(text, *args, **options)

    def opening(path, **options):
        if Path(path).parent in (dense, other):
            opened[Path(path).parent.name] += 1
        return safe_open(path, **options)

    monkeypatch.setattr(json, "loads", counted)
    monkeypatch.setattr(tensor_files, "safe_open", opening)
    how = ["--seqlen", "16", "--samples", "2"]
    if command == "eval":
        call("eval", other, "--reference", dense, "--perplexity", text, *how)
    else:
        call("prune", dense, tmp_path / "out", "--calibration", text, *how)
    folders = {"dense": 1, "other": 1} if command == "eval" else {"dense": 1}
    assert (parsed, opened) == (folders, folders)
