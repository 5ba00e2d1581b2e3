"""`prunus lm-eval`: lm-eval's own command line, which then loads packed models."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from packed_reference import pruned_checkpoint
from prunus import pack
from prunus.cli import app
from tiny_tokenizer import VOCABULARY, byte_tokenizer

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: 0
"""


def call(*arguments: object) -> int:
    result = CliRunner().invoke(app, ["lm-eval", *(str(argument) for argument in arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code


def test_arguments_are_handed_over_as_they_are(monkeypatch):
    lm_eval = pytest.importorskip("lm_eval.__main__")
    seen, before = [], list(sys.argv)
    monkeypatch.setattr(lm_eval, "cli_evaluate", lambda: seen.append(sys.argv[1:]))
    arguments = ["run", "--model", "hf", "-t", "a,b", "--model_args", "pretrained=x,dtype=auto"]
    assert call(*arguments) == 0
    assert seen == [arguments]
    assert sys.argv == before


@pytest.mark.slow  # lm-eval reads its whole catalogue of tasks
@pytest.mark.filterwarnings("ignore")  # those of lm-eval and of the libraries below it
def test_a_packed_model_is_scored_by_the_command_of_lm_eval(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pruned = pruned_checkpoint(tmp_path / "pruned", vocab_size=VOCABULARY)
    byte_tokenizer().save_pretrained(pruned)
    pack(pruned, tmp_path / "packed")
    rows: Path = tmp_path / "rows.json"
    rows.write_text("\n".join(json.dumps({"question": f"Is {n} one?"}) for n in range(2)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(rows=rows))
    model = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'packed'}"]
    task = ["--tasks", "tiny", "--include_path", tmp_path / "tasks", "--device", "cpu"]
    assert call(*model, *task, "--output_path", tmp_path / "out") == 0
    (found,) = (tmp_path / "out").rglob("results_*.json")
    assert "acc,none" in json.loads(found.read_text())["results"]["tiny"]
