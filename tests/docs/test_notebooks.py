"""The notebooks of `examples/`, run on a tiny model, or on that of the variable PRUNUS_MODEL.

Their cells are plain Python, so Jupyter is not needed.
"""

import json
import os
import re

import pytest

from gguf_cases import gguf_checkpoint
from places import REPOSITORY

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
        model = gguf_checkpoint(tmp_path / "model", max_position_embeddings=512)
        for file in model.glob("tokenizer*.json"):
            # The name that the import of a GGUF file gives its last token.
            file.write_text(file.read_text().replace("</s>", "<|endoftext|>"))
        template = "{% for each in messages %}{{ each.content }}{% endfor %}"
        (model / "chat_template.jinja").write_text(template)
        monkeypatch.setenv("PRUNUS_MODEL", str(model))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for source in sources:
        exec(compile(source, path.name, "exec"), names)
    assert "KL divergence" in capsys.readouterr().out
