"""The commands of the page about llama.cpp, where the variable LLAMA_CPP names a folder with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from documentation import blocks
from places import REPOSITORY
from tiny import tiny_checkpoint
from tiny_tokenizer import byte_tokenizer

PAGE = REPOSITORY / "docs" / "how-to" / "llama-cpp.md"
CALIBRATION = ["--samples", "4", "--seqlen", "16", "--calibration", "python-docs"]
#: Options that make a command take seconds.
SMALL = {"prune": CALIBRATION, "shrink": [*CALIBRATION, "--overwrite"]}
LLAMA_CPP = os.environ.get("LLAMA_CPP", "")
TEXT = "the quick brown fox jumps over a lazy dog once upon time in land far away"
WORDS = TEXT.split()

pytestmark = pytest.mark.skipif(
    not LLAMA_CPP, reason="LLAMA_CPP names no folder with llama.cpp and its converter"
)


def tokenizer_file(folder: Path) -> int:
    """Write a SentencePiece model, of which the converter knows the kind; returns its size.

    transformers reads the other tokenizer beside it.
    """
    byte_tokenizer().save_pretrained(folder)
    sentencepiece = pytest.importorskip("sentencepiece")
    sentences = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    (folder / "text").write_text("\n".join(sentences * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    loaded = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return int(loaded.vocab_size())


def test_the_page_goes_from_a_checkpoint_to_a_text(tmp_path):
    model = tmp_path / "MODEL"
    model.mkdir()
    tiny_checkpoint(
        model,
        dtype=torch.bfloat16,
        vocab_size=tokenizer_file(model),
        hidden_size=64,
        num_hidden_layers=10,
    )
    (tmp_path / "wiki.test.raw").write_text(" ".join(WORDS * 400))
    ran = []
    for block in blocks(PAGE):
        for words in block.commands() if block.language == "sh" else []:
            if words[0] == "ollama":
                continue
            program, *arguments = [word.replace("$LLAMA_CPP", LLAMA_CPP) for word in words]
            command = {"prunus": [sys.executable, "-m", "prunus"], "python": [sys.executable]}.get(
                program, [program]
            )
            if program == "prunus":
                arguments += SMALL.get(arguments[0], [])
            environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
            done = subprocess.run(
                [*command, *arguments],
                cwd=tmp_path,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
            assert done.returncode == 0, f"{words}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
            ran.append(Path(program).name)
            if ran[-1] == "llama-completion":
                assert "Once upon" in done.stdout
    assert {"prunus", "python", "llama-quantize", "llama-completion", "llama-perplexity"} == {*ran}
    # Removed blocks are gone from the file; zeros are not.
    size = {name: (tmp_path / f"{name}.gguf").stat().st_size for name in ("smaller", "dense")}
    assert size["smaller"] < size["dense"]
