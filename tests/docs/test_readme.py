"""The first command of the README runs after an installation without any extra."""

import importlib.util
import shlex

import pytest

from command_line import call
from places import REPOSITORY
from tiny import tiny_checkpoint
from tiny_tokenizer import VOCABULARY, byte_tokenizer

EXTRAS = {"datasets", "pyarrow", "lm_eval", "gguf", "accelerate", "peft", "PIL"}


@pytest.mark.parametrize("page", ["README.md", "docs/start/first-prune.md"])
def test_the_first_command_needs_no_extra(page, tmp_path, monkeypatch):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    first = next(line for line in text.splitlines() if line.startswith("prunus prune"))
    _, verb, _model, out, *options = shlex.split(first)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name in EXTRAS else find_spec(name, *rest),
    )
    dense = tiny_checkpoint(tmp_path / "dense", vocab_size=VOCABULARY)
    byte_tokenizer().save_pretrained(dense)
    options += ["--samples", "2", "--seqlen", "16"]
    assert "self_attn.q_proj" in call(verb, dense, tmp_path / out, *options).stdout
