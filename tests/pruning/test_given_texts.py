"""Calibration that a Python program gives: texts, data sets and chats; a loaded model's tokenizer;
and whether windows begin with BOS.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunus
from prunus.calibration.sources import Documents, find_source
from prunus.calibration.windows import WindowRequest
from tiny import shards, tiny_checkpoint, token_ids
from tiny_tokenizer import VOCABULARY, byte_tokenizer

SENTENCES = [f"The quick brown fox number {n} jumps over the lazy dog. " * 2 for n in range(12)]
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because. " * 9}]
SMALL = {"samples": 4, "seqlen": 16}


def tokenizer_with_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    )
    return tokenizer


class Rows:
    """As much of a data set as calibration reads."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return self.rows[place]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("texts") / "dense", vocab_size=VOCABULARY)
    tokenizer_with_template().save_pretrained(folder)
    return folder


def test_lists_and_data_sets_of_texts_give_the_windows_of_a_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "text.jsonl"
    rows = datasets.Dataset.from_dict({"text": SENTENCES})
    rows.to_json(path)
    wanted = WindowRequest(seed=3, tokenizer=byte_tokenizer, **SMALL)
    expected = find_source(str(path)).draw(wanted)
    for given in (SENTENCES, tuple(SENTENCES), rows, rows["text"], Rows([*rows])):
        found = find_source(given).draw(wanted)
        assert torch.equal(found.ids, expected.ids)
        assert found.bos == expected.bos
        assert found.source == "12 texts given by the caller; windows from 4 documents"


def test_chats_go_through_the_template():
    tokenizer = tokenizer_with_template()
    expected = f"user: Why?\nassistant: {'Because. ' * 9}\n"
    found = Documents([CHAT, {"messages": CHAT}, "text"], tokenizer)
    assert list(found) == [expected, expected, "text"]
    with pytest.raises(ValueError, match="no chat template; give texts instead"):
        Documents([CHAT], byte_tokenizer())[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": SENTENCES}, "a dict. Choose one of its parts: train"),
        (iter(SENTENCES), "itertools.islice"),
        (7, "token ids .* or texts: .*, not a int"),
        ([torch.zeros(2000)], r"text 0 is a tensor \(2000,\)"),
        ([{"content": "x"}], "text 0 is a row with the columns content"),
        (["ok", 3], "text 1 is a int"),
        (["", " "], "2 texts given by the caller: "),
    ],
)
def test_what_is_no_text_is_refused(given, message, dense, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        prunus.prune(dense, tmp_path / "out", calibration=given, **SMALL)


def test_a_checkpoint_is_pruned_on_texts_and_resumes(dense, tmp_path):
    options = {"calibration": [CHAT] * 8, **SMALL}
    first = prunus.prune(dense, tmp_path / "out", **options)
    assert first.recipe.calibration == "texts"
    assert first.inputs.calibration.startswith("8 texts given by the caller")
    assert prunus.prune(dense, tmp_path / "out", **options) == first
    with pytest.raises(FileExistsError):
        prunus.prune(dense, tmp_path / "out", calibration=SENTENCES, **SMALL)


def test_a_loaded_model_finds_its_tokenizer_where_it_was_loaded_from(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense)
    report = prunus.prune(model, calibration=SENTENCES, **SMALL)
    on_disk = prunus.prune(dense, tmp_path / "out", calibration=SENTENCES, **SMALL)
    assert report.inputs.calibration_sha256 == on_disk.inputs.calibration_sha256


def test_errors_hold_no_tensors(dense, tmp_path):
    with pytest.raises((TypeError, ValueError)) as caught:
        prunus.prune(dense, tmp_path / "out", only=token_ids(64, 64), calibration=token_ids())
    assert "a Tensor of shape (64,)" in str(caught.value)
    assert str(caught.value).endswith("and 60 more")
    with pytest.raises((TypeError, ValueError)) as caught:
        prunus.prune(dense, tmp_path / "out", torch.zeros(99, 99), calibration=token_ids())
    assert len(str(caught.value)) < 300


# --- what windows begin with ---

TEXT = "The quick brown fox jumps over the lazy dog; " * 20


@pytest.fixture
def with_bos(tmp_path):
    """A checkpoint whose tokenizer puts BOS first, beside a text."""
    folder = tiny_checkpoint(tmp_path / "with_bos", vocab_size=VOCABULARY)
    byte_tokenizer(bos=True).save_pretrained(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    return folder


def prune(with_bos, name, **options):
    text = {"calibration": str(with_bos.parent / "text.txt")} | options
    return prunus.prune(with_bos, with_bos.parent / name, samples=4, seqlen=16, **text)


def test_the_manifest_and_the_card_say_which_it_was(with_bos):
    auto, no = prune(with_bos, "auto"), prune(with_bos, "no", bos="no")
    assert (auto.recipe.bos, auto.inputs.bos) == ("auto", "yes")
    assert (no.recipe.bos, no.inputs.bos) == ("no", "no")
    assert auto.inputs.calibration_sha256 != no.inputs.calibration_sha256
    assert shards(with_bos.parent / "auto") != shards(with_bos.parent / "no")
    for name, words in (("auto", "BOS first in every window"), ("no", "no BOS added to windows")):
        assert words in (with_bos.parent / name / "README.md").read_text()
    given = prune(with_bos, "given", calibration=token_ids(4, 16))
    assert given.inputs.bos == "given"
    with pytest.raises(ValueError, match="windows of token ids stay as they are given"):
        prune(with_bos, "refused", calibration=token_ids(4, 16), bos="yes")
    assert not (with_bos.parent / "refused").exists()
