"""A folder is opened once in a command, whoever asks for its configuration or its headers."""

from collections import Counter
from pathlib import Path

import pytest

from command_line import call
from prunus.evaluation import check
from prunus.model.checkpoint import files, tensor_files
from tiny_tokenizer import dense_checkpoint

HOW = "--seqlen 16 --samples 2"
SWEEP = """
models = ["{dense}"]
recipe = {{calibration = "{text}", samples = 2, seqlen = 16}}
scoring = {{texts = ["{text}"], samples = 2, seqlen = 16}}
grid = [{{method = ["wanda"], sparsity = [0.5]}}]
"""
COMMANDS = {
    f"eval {{pruned}} --reference {{dense}} --perplexity {{text}} {HOW}": ("dense", "pruned"),
    f"prune {{dense}} {{out}} --calibration {{text}} {HOW}": ("dense",),
    f"compress {{dense}} {{out}} --calibration {{text}} --format mlx --bits 8 --check {HOW}": (
        "dense",
    ),
    "recover {pruned} {out} --text {text} --tokens 32 --seqlen 16 --held-out 1": ("pruned",),
    "sweep {grid} {out}": ("dense",),
    f"plan {{dense}} --calibration {{text}} --format mlx --bits 8 {HOW}": ("dense",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reads_the_configuration_and_the_headers_of_a_folder_once(
    command, tmp_path, monkeypatch
):
    dense, other, text = (tmp_path / name for name in ("dense", "pruned", "a.txt"))
    named = {"dense": dense, "pruned": other, "text": text, "out": tmp_path / "out"}
    named["grid"] = tmp_path / "grid.toml"
    dense_checkpoint(dense)
    text.write_text("a text of some words, " * 200)
    named["grid"].write_text(SWEEP.format(**named))
    call("prune", dense, other, "--calibration", text, *HOW.split())
    parsed, opened = Counter[str](), Counter[Path]()
    parse, safe_open = files._parsed, tensor_files.safe_open

    def parsing(path, content):
        if path.name == "config.json" and path.parent in (dense, other):
            parsed[path.parent.name] += 1
        return parse(path, content)

    def opening(path, **options):
        if Path(path).parent in (dense, other):
            opened[path] += 1
        return safe_open(path, **options)

    monkeypatch.setattr(check, "TEXTS", (str(text),))
    monkeypatch.setattr(files, "_parsed", parsing)
    monkeypatch.setattr(tensor_files, "safe_open", opening)
    call(*(word.format(**named) for word in command.split()))
    assert parsed == dict.fromkeys(COMMANDS[command], 1)
    assert ({*opened.values()}, {Path(x).parent.name for x in opened}) == ({1}, {*parsed})
