"""The notebooks of `examples/`. They are executed where Jupyter, matplotlib and a model are:

PRUNUS_MODEL=FOLDER python -m pytest -m slow tests/docs/test_notebooks.py
"""

import json
import os
import re

import pytest

from places import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "examples").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_a_notebook_is_small_python_with_outputs_and_names_no_folder(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 60_000
    assert not re.search(r"[\"' ]/(home|root|tmp|work|Users)/", text)
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        compile("".join(cell["source"]), path.name, "exec")
        assert all(output["output_type"] != "error" for output in cell["outputs"])
    assert any(cell["outputs"] for cell in cells)


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs(path, tmp_path):
    needed = ("nbclient", "nbformat", "ipykernel", "matplotlib")
    nbclient, nbformat, *_ = map(pytest.importorskip, needed)
    if "PRUNUS_MODEL" not in os.environ:
        pytest.skip("needs PRUNUS_MODEL, the folder of a model")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(nbformat.read(path, 4), timeout=1800, resources=resources).execute()
