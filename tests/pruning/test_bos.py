"""A run, a recovery and a score say whether their windows begin with BOS, and resume with it."""

import pytest

import prunus
from stopping import StopError, stop_after
from tiny import shards, tiny_checkpoint, token_ids
from tiny_tokenizer import VOCABULARY, byte_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog; " * 20


@pytest.fixture
def dense(tmp_path):
    """A checkpoint whose tokenizer puts BOS first, beside a text."""
    folder = tiny_checkpoint(tmp_path / "dense", vocab_size=VOCABULARY)
    byte_tokenizer(bos=True).save_pretrained(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    return folder


def prune(dense, name, **options):
    text = {"calibration": str(dense.parent / "text.txt")} | options
    return prunus.prune(dense, dense.parent / name, samples=4, seqlen=16, **text)


def test_the_manifest_and_the_card_say_which_it_was(dense):
    auto, no = prune(dense, "auto"), prune(dense, "no", bos="no")
    assert (auto.recipe.bos, auto.inputs.bos) == ("auto", "yes")
    assert (no.recipe.bos, no.inputs.bos) == ("no", "no")
    assert auto.inputs.calibration_sha256 != no.inputs.calibration_sha256
    assert shards(dense.parent / "auto") != shards(dense.parent / "no")
    for name, words in (("auto", "BOS first in every window"), ("no", "no BOS added to windows")):
        assert words in (dense.parent / name / "README.md").read_text()
    given = prune(dense, "given", calibration=token_ids(4, 16))
    assert given.inputs.bos == "given"
    with pytest.raises(ValueError, match="windows of token ids stay as they are given"):
        prune(dense, "refused", calibration=token_ids(4, 16), bos="yes")
    assert not (dense.parent / "refused").exists()


def test_a_resumed_run_has_the_same_bytes_and_no_other_bos(dense):
    prune(dense, "whole")

    with pytest.raises(StopError):
        prune(dense, "resumed", progress=stop_after(1))
    with pytest.raises(FileExistsError, match="another bos"):
        prune(dense, "resumed", bos="no")
    prune(dense, "resumed")
    assert shards(dense.parent / "whole") == shards(dense.parent / "resumed")


def test_a_score_says_which_it_was(dense):
    options = {"seqlen": 16, "dtype": "float32"}
    scores = {
        bos: prunus.perplexity(dense, str(dense.parent / "text.txt"), bos=bos, **options)
        for bos in ("auto", "no", "yes")
    }
    assert [scores[bos].bos for bos in scores] == ["yes", "no", "yes"]
    assert scores["auto"].loss == scores["yes"].loss != scores["no"].loss
    assert scores["auto"].as_dict()["bos"] == "yes"
    assert "BOS first in every window" in scores["auto"].protocol
    assert "no BOS added to windows" in scores["no"].protocol
