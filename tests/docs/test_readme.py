"""The first command of the README runs after an installation without any extra."""

import shlex

import pytest

from command_line import call
from places import REPOSITORY
from tiny_tokenizer import dense_checkpoint


@pytest.mark.parametrize("page", ["README.md", "docs/start/first-prune.md"])
def test_the_first_command_needs_no_extra(page, tmp_path, uninstalled):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    first = next(line for line in text.splitlines() if line.startswith("prunus prune"))
    _, verb, _model, out, *options = shlex.split(first)
    uninstalled("datasets", "pyarrow", "lm_eval", "gguf", "accelerate", "peft", "PIL")
    dense = dense_checkpoint(tmp_path / "dense")
    options += ["--samples", "2", "--seqlen", "16"]
    assert "self_attn.q_proj" in call(verb, dense, tmp_path / out, *options).stdout
