"""A packed folder, which versions before 0.4 made, is refused in one sentence and left alone."""

import re
from pathlib import Path

import pytest

from changes import edit_json
from command_line import call
from tiny import tree
from tiny_tokenizer import dense_checkpoint

SAID = (
    r"prunus before 0\.4 made it, and this version does not read it\. `prunus unpack` of version "
    r"0\.3"
)


@pytest.mark.parametrize("line", ["prune packed out", "inspect packed", "import packed out"])
def test_a_packed_folder_is_refused_with_the_version_that_turns_it_back(
    line, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    described = {"quant_method": "prunus", "format_version": 3, "linears": {}}
    edit_json(dense_checkpoint(tmp_path / "packed") / "config.json", quantization_config=described)
    before = tree(tmp_path)
    said = call(*line.split(), status=2).stderr.splitlines()
    assert re.search(SAID, said[-1]), said[-1]
    assert tree(tmp_path) == before
