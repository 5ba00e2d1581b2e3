"""The notebooks of `examples/`, run on a tiny model, or on that of the variable PRUNUS_MODEL.

Their cells are plain Python, so Jupyter is not needed.
"""

import json
import os
import re

import pytest

from places import REPOSITORY
from tiny_tokenizer import byte_tokenizer, dense_checkpoint

NOTEBOOKS = sorted((REPOSITORY / "examples").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_a_notebook_is_small_python_with_outputs_and_names_no_folder(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 60_000
    assert not re.search(r"[\"' ]/(home|root|tmp|work|Users)/", text)
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    assert any(cell["outputs"] for cell in cells)


@pytest.mark.usefixtures("short_python_texts")
@pytest.mark.filterwarnings("ignore:.*non-interactive", "ignore:mix. C4 cannot be loaded")
@every_notebook
def test_a_notebook_runs(path, tmp_path, monkeypatch, capsys):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    if any("matplotlib" in source for source in sources):
        pytest.importorskip("matplotlib")
    if "PRUNUS_MODEL" not in os.environ:
        model = dense_checkpoint(tmp_path / "model", max_position_embeddings=512)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{% for each in messages %}{{ each.content }}{% endfor %}"
        tokenizer.save_pretrained(model)
        monkeypatch.setenv("PRUNUS_MODEL", str(model))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for source in sources:
        exec(compile(source, path.name, "exec"), names)
    assert "KL divergence" in capsys.readouterr().out
