"""Windows begin with BOS where the tokenizer puts it before a text, and nowhere else."""

import random

import pytest
import torch
from safetensors.torch import save_file

from prunus.calibration.sources import find_source
from prunus.calibration.training_text import training_text
from prunus.calibration.windows import WindowRequest, bos_token
from prunus.evaluation.options import TextOptions
from prunus.evaluation.perplexity import scoring_windows
from tiny_tokenizer import BOS, byte_tokenizer

#: What the user asks, whether the tokenizer adds BOS, and whether windows then begin with it.
CASES = [
    ("auto", True, True),
    ("auto", False, False),
    ("yes", True, True),
    ("yes", False, True),
    ("no", True, False),
    ("no", False, False),
]
#: Makes windows of 8 tokens; see the functions below.
KINDS = ["calibration", "documents", "training", "documents for training", "scoring"]


@pytest.fixture
def texts(tmp_path) -> dict[str, str]:
    letters = random.Random(0).choices("abcdefghij ", k=400)
    (tmp_path / "one.txt").write_text("".join(letters))
    lines = [f'{{"text": "{"".join(letters[n : n + 40])}"}}' for n in range(0, 400, 40)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    return {"one": str(tmp_path / "one.txt"), "many": str(tmp_path / "many.jsonl")}


def windows(kind: str, texts: dict[str, str], tokenizer, bos: str) -> tuple[torch.Tensor, str]:
    """Windows of 8 tokens, and what they are said to begin with."""
    source = texts["many" if "documents" in kind else "one"]
    if kind == "scoring":
        found = scoring_windows(source, lambda: tokenizer, 8, TextOptions(samples=20, bos=bos))
        return found.ids, found.bos
    options = {"tokenizer": lambda: tokenizer, "seqlen": 8, "seed": 0, "bos": bos}
    if "training" in kind:
        text = training_text(source, WindowRequest(**options), 2)
        return torch.cat([text.held_out, text.windows(0, 6)]), text.bos
    drawn = find_source(source).draw(WindowRequest(samples=6, **options))
    return drawn.ids, drawn.bos


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("asked", "adds", "expected"), CASES)
def test_bos_takes_the_place_of_the_first_token_alone(kind, asked, adds, expected, texts):
    tokenizer = byte_tokenizer(bos=adds)
    found, said = windows(kind, texts, tokenizer, asked)
    plain, _ = windows(kind, texts, tokenizer, "no")
    assert said == ("yes" if expected else "no")
    assert torch.equal(found[:, 1:], plain[:, 1:])
    if expected:
        assert (found[:, 0] == BOS).all()
    else:
        assert torch.equal(found, plain)
        assert (plain[:, 0] != BOS).sum() >= len(plain) - 1


def test_a_token_that_is_not_first_is_no_bos():
    """Some tokenizers put another token first, or have a BOS token that they never add."""

    class Other:
        bos_token_id = 7

        def __call__(self, text, verbose=False):
            return {"input_ids": [3, 7, 9]}

    assert bos_token(Other(), "auto") is None
    assert bos_token(Other(), "yes") == 7


def test_bad_choices(texts, tmp_path):
    class Without:
        bos_token_id = None

    with pytest.raises(ValueError, match="`bos` is yes, and this tokenizer has no BOS token"):
        bos_token(Without(), "yes")
    ids = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.arange(64).view(4, 16)}, ids)
    with pytest.raises(ValueError, match=r"ids\.safetensors stay as they are given"):
        scoring_windows(str(ids), byte_tokenizer, 8, TextOptions(bos="yes"))
    source, wanted = find_source(str(ids)), WindowRequest(samples=2, seqlen=8)
    with pytest.raises(ValueError, match=r"ids\.safetensors stay as they are given"):
        source.check(WindowRequest(samples=2, seqlen=8, bos="yes"))
    with pytest.raises(ValueError, match=r"ids\.safetensors stay as they are given"):
        training_text(str(ids), WindowRequest(seqlen=8, bos="yes"), 1)
    assert source.draw(wanted).bos == training_text(str(ids), wanted, 1).bos == "given"
