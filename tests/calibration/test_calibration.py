"""Where calibration windows come from, and with which token they begin."""

import argparse
import email.message
import gzip
import hashlib
import io
import json
import random
import struct
import threading
import urllib.error
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from prunus.calibration.corpora import load_corpus, python_code, python_docs
from prunus.calibration.draw import TextTooShort, windows_from_documents, windows_from_stream
from prunus.calibration.files import read_documents
from prunus.calibration.sources import find_source
from prunus.calibration.training_text import training_text
from prunus.calibration.windows import WindowRequest, Windows, bos_token
from prunus.evaluation.eval_options import TextOptions
from prunus.evaluation.perplexity import scoring_windows
from refusals import assert_refused
from tiny_tokenizer import BOS, byte_tokenizer

C4_FILE = "c4_en_train_shard0_first1000.jsonl.gz"


def load(source, tokenizer=None, **options) -> Windows:
    wanted = WindowRequest(**{"samples": 4, "seqlen": 8, "tokenizer": lambda: tokenizer} | options)
    found = find_source(str(source))
    found.check(wanted)
    return found.draw(wanted)


def check_source(source: str, data: Path | None) -> None:
    find_source(source).check(WindowRequest(samples=1, seqlen=2, data=data))


def json_lines(path: Path, documents: list[str]) -> Path:
    text = "".join(json.dumps({"text": document, "url": "x"}) + "\n" for document in documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return path


def letters(count: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=count))


class SpellingTokenizer:
    """A document is its token ids, divided by commas. Counts the documents that it sees."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, texts, verbose=True):
        assert not verbose
        self.seen += len(texts)
        return {"input_ids": [[int(piece) for piece in text.split(",")] for text in texts]}


def numbered(lengths: list[int]) -> list[str]:
    """Documents whose token ids say where they stand: 1000 * document + position."""
    return [",".join(str(1000 * d + p) for p in range(length)) for d, length in enumerate(lengths)]


def draw_documents(documents, samples, seqlen, seed=0, tokenizer=None):
    sizes = {"samples": samples, "seqlen": seqlen, "rng": random.Random(seed)}
    return windows_from_documents(documents, tokenizer or SpellingTokenizer(), **sizes)


# --- random windows of documents ---


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    seqlen=st.integers(2, 12),
    samples=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_document_windows_are_different_pieces_of_long_documents(lengths, seqlen, samples, seed):
    def draw():
        return draw_documents(numbered(lengths), samples, seqlen, seed)

    starts = sum(max(length - seqlen, 0) for length in lengths)
    if starts == 0:
        assert_refused(TextTooShort, f"the longest has {max(lengths)}", draw)
        return
    if starts < samples:
        assert_refused(ValueError, f"only {starts} different windows of {seqlen} tokens", draw)
        return
    ids, used = draw()
    assert ids.shape == (samples, seqlen)
    assert ids.dtype == torch.int64
    assert len({tuple(row) for row in ids.tolist()}) == samples
    per_document = Counter()
    for row in ids.tolist():
        document, start = divmod(row[0], 1000)
        assert row == list(range(row[0], row[0] + seqlen))
        # As in the paper: the window starts before the last S tokens of the document.
        assert start < lengths[document] - seqlen
        per_document[document] += 1
    long_enough = [d for d, length in enumerate(lengths) if length > seqlen]
    assert used == len(per_document) == min(samples, len(long_enough))
    if samples <= len(long_enough):
        assert max(per_document.values()) == 1, "a document is used again only when all have been"
    assert torch.equal(ids, draw()[0])


def test_every_start_of_a_document_can_be_drawn():
    rows = (draw_documents(numbered([12]), 1, 8, seed)[0] for seed in range(200))
    starts = Counter(int(row[0, 0]) for row in rows)
    assert set(starts) == {0, 1, 2, 3}
    assert min(starts.values()) > 20


def test_no_more_documents_are_tokenised_than_are_looked_at():
    tokenizer = SpellingTokenizer()
    draw_documents(numbered([20] * 500), 40, 8, tokenizer=tokenizer)
    assert tokenizer.seen == 64


@given(
    length=st.integers(1, 60),
    seqlen=st.integers(2, 20),
    samples=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_stream_windows_are_different_pieces_of_the_text(length, seqlen, samples, seed):
    def draw():
        sizes = {"samples": samples, "seqlen": seqlen, "rng": random.Random(seed)}
        return windows_from_stream(torch.arange(length), **sizes)

    if length <= seqlen:
        assert_refused(ValueError, f"the whole text has {length} tokens", draw)
    elif length - seqlen < samples:
        assert_refused(ValueError, f"only {length - seqlen} different windows", draw)
    else:
        ids = draw()
        assert torch.equal(ids, ids[:, :1] + torch.arange(seqlen))
        assert int(ids.max()) < length
        assert len(set(ids[:, 0].tolist())) == samples
        assert torch.equal(ids, draw())


# --- c4, wikitext2, ptb ---


def test_c4_from_a_data_folder(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    documents = [letters(5 + 3 * i, i) for i in range(30)]
    json_lines(tmp_path / "c4" / C4_FILE, documents)
    windows = load("c4", tokenizer, samples=6, seqlen=50, data=tmp_path)
    assert windows.ids.shape == (6, 50)
    for row in windows.ids:
        text = tokenizer.decode(row)
        assert any(text in document and len(document) > 50 for document in documents)
    assert C4_FILE in windows.source
    assert str(tmp_path) not in windows.source
    monkeypatch.setenv("PRUNUS_DATA", str(tmp_path))
    again, other = (load("c4", tokenizer, samples=6, seqlen=50, seed=seed) for seed in (0, 1))
    assert torch.equal(windows.ids, again.ids)
    assert windows.sha256 == again.sha256 != other.sha256
    # The original file comes before its stand-in, if the data folder has it.
    json_lines(tmp_path / "c4" / "c4-train.00000-of-01024.json.gz", [letters(100, 5)])
    assert "c4-train.00000-of-01024.json.gz" in load("c4", tokenizer).source


def test_c4_documents_are_counted_in_tokens(tmp_path):
    json_lines(tmp_path / "c4" / C4_FILE, ["x" * 8, "y" * 3])
    windows = load("c4", byte_tokenizer(bos=True), samples=1, seqlen=8, data=tmp_path)
    assert windows.ids[0, 0] == BOS
    message = r"none of the 2 documents is longer than 8 tokens; the longest has 8\. Use a smaller"
    assert_refused(
        ValueError, message, load, "c4", byte_tokenizer(), samples=1, seqlen=8, data=tmp_path
    )


def test_wikitext2_calibration_prefers_the_raw_text_and_says_what_it_used(tmp_path):
    tokenizer = byte_tokenizer()
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    (folder / "train_unk_shuffled_articles.txt.gz").write_bytes(
        gzip.compress(b" \n = A = \n <unk> words \n" * 9, mtime=0)
    )
    windows = load("wikitext2", tokenizer, data=tmp_path)
    assert "<unk>" in windows.source
    text = " ".join(["", " = A = \n", " <unk> words \n"] * 9)
    assert all(tokenizer.decode(row) in text for row in windows.ids)
    (folder / "wiki.train.raw").write_text(" \n = B = \n raw words \n" * 9)
    source = load("wikitext2", tokenizer, data=tmp_path).source
    assert source == "wikitext2 (wikitext2/wiki.train.raw)"


HUB = {
    "c4": {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}},
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "ptb": {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"},
}


@pytest.mark.parametrize("source", HUB)
def test_without_a_data_folder_corpora_come_from_the_hub(monkeypatch, source):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(**arguments):
        asked.append(arguments)
        rows = {"sentence" if source == "ptb" else "text": [letters(60, i) for i in range(20)]}
        return datasets.Dataset.from_dict(rows | {"other": ["x"] * 20})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_source(source, None)
    assert not asked, "a check must not download"
    windows = load(source, byte_tokenizer(), samples=5, seqlen=16)
    assert asked == [HUB[source] | {"split": "train"}]
    assert windows.ids.shape == (5, 16)
    assert "from the hub" in windows.source


def test_data_folders(tmp_path, monkeypatch):
    for file in (f"c4/{C4_FILE}", "wikitext2/wiki.train.raw", "ptb/ptb.train.txt"):
        source = file.partition("/")[0]
        assert_refused(FileNotFoundError, file, check_source, source, tmp_path)
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(" one sentence \n another one \n")
        check_source(source, tmp_path)
    assert load_corpus("ptb", "calibration", tmp_path).whole() == "one sentence another one"
    for source in ("c4", "mix"):
        with pytest.raises(FileNotFoundError, match="nowhere: the data folder does not exist"):
            check_source(source, tmp_path / "nowhere")
    monkeypatch.setenv("PRUNUS_DATA", str(tmp_path / "lost"))
    assert_refused(
        FileNotFoundError, "lost: the data folder in PRUNUS_DATA", check_source, "wikitext2", None
    )


def test_missing_extra_is_named_before_any_work(uninstalled):
    uninstalled("datasets")
    assert_refused(
        ModuleNotFoundError, r"needs datasets: pip install '\.\[data\]'", check_source, "c4", None
    )


# --- python-docs ---


def test_python_docs_halves_share_no_paragraph_and_the_first_one_is_drawn_from():
    tokenizer = byte_tokenizer()
    texts = {part: python_docs(part) for part in ("calibration", "scoring")}
    first, second = ({" ".join(p.split()) for p in text} for text in texts.values())
    assert not first & second
    sizes = [sum(map(len, half)) for half in (first, second)]
    assert min(sizes) > 100_000
    assert min(sizes) / max(sizes) > 0.9
    windows = load("python-docs", tokenizer, samples=8, seqlen=300)
    whole = "\n\n".join(texts["calibration"])
    assert all(tokenizer.decode(row) in whole for row in windows.ids)


def test_python_code_is_the_library_of_this_python(monkeypatch, tmp_path):
    calibration, scoring = python_code("calibration"), python_code("scoring")
    assert not {*calibration} & {*scoring}
    assert sum(map(len, calibration)) > 5_000_000 > sum(map(len, scoring)) > 400_000
    for module, part in ((argparse, scoring), (zipfile, scoring), (email.message, calibration)):
        assert Path(module.__file__).read_text(encoding="utf-8") in part
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    for source in ("python-code", "mix"):
        with pytest.raises(ModuleNotFoundError, match="without the source code of its standard"):
            check_source(source, None)


@pytest.mark.usefixtures("short_python_texts")
def test_mix_interleaves_prose_and_code(tmp_path, monkeypatch, uninstalled):
    tokenizer = byte_tokenizer()
    json_lines(tmp_path / "c4" / C4_FILE, [letters(400, i) for i in range(40)])
    options = {"tokenizer": tokenizer, "seqlen": 200, "data": tmp_path}
    mixed = load("mix", samples=64, **options)
    is_code = torch.tensor(["\n" in tokenizer.decode(row) for row in mixed.ids])
    for size in (1, 2, 4, 8):
        assert is_code.view(-1, size)[3::4].float().mean() == 0.25
    assert all(abs(is_code[:end].sum() - end / 4) <= 1 for end in range(65))
    alone = [load("c4", samples=48, **options), load("python-code", samples=16, **options)]
    assert torch.equal(mixed.ids[~is_code], alone[0].ids)
    assert torch.equal(mixed.ids[is_code], alone[1].ids)
    assert mixed.source == f"75% {alone[0].source}; 25% {alone[1].source}"
    assert torch.equal(load("mix", samples=1, **options).ids, load("c4", samples=1, **options).ids)
    text = training_text(
        "mix", WindowRequest(**options | {"tokenizer": lambda: tokenizer}), held_out=4
    )
    rows = (*text.held_out, *text.windows(0, 4))
    assert ["\n" in tokenizer.decode(row) for row in rows] == is_code[:8].tolist()
    # With a chat template, one window in eight is prose in the shape of a chat.
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chatty = load("mix", samples=64, **options)
    assert sum(tokenizer.decode(row).startswith("<user>") for row in chatty.ids) == 8
    assert torch.equal(chatty.ids[is_code], mixed.ids[is_code])
    assert chatty.source.startswith("62.5% ")
    tokenizer.chat_template = None
    # Without C4, documentation takes the place of prose.
    monkeypatch.delenv("PRUNUS_DATA", raising=False)
    uninstalled("datasets")
    with pytest.warns(RuntimeWarning, match="C4 cannot be loaded .*needs datasets.*python-docs"):
        without = load("mix", samples=8, **options | {"data": None})
    docs = load("python-docs", samples=6, **options)
    assert torch.equal(without.ids[~is_code[:8]], docs.ids)
    assert f"75% {docs.source}; " in without.source


# --- files ---


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.JSONL.gz"])
def test_documents_of_a_file(tmp_path, name):
    # U+2028 inside a document does not end a JSON line.
    documents = ["short", letters(40, 1) + "\u2028" + letters(40, 2), "", letters(90, 3)]
    path = tmp_path / name
    json_lines(path, documents)
    tokenizer = byte_tokenizer()
    windows = load(path, tokenizer, samples=10, seqlen=50)
    # A window that cuts the three bytes of U+2028 does not decode, so it is left out.
    texts = [text for row in windows.ids if "\ufffd" not in (text := tokenizer.decode(row))]
    assert all(any(text in document for document in documents) for text in texts)
    assert windows.source == f"{path.name}; windows from 2 documents"


def test_short_documents_are_joined(tmp_path):
    tokenizer = byte_tokenizer()
    documents = [letters(20, i) for i in range(6)]
    windows = load(json_lines(tmp_path / "a.jsonl", documents), tokenizer, samples=5, seqlen=40)
    assert all(tokenizer.decode(row) in "\n\n".join(documents) for row in windows.ids)
    assert "6 documents joined, too few are longer than a window" in windows.source
    # Two documents have 10 windows of their own, and 49 together.
    longer = json_lines(tmp_path / "b.jsonl", [letters(45, i) for i in range(2)])
    windows = load(longer, tokenizer, samples=20, seqlen=40)
    assert "2 documents joined" in windows.source
    assert len({tuple(row) for row in windows.ids.tolist()}) == 20


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_plain_text_keeps_every_byte(tmp_path, name):
    text = "one\r\ntwo\n\nüber\x0c" * 4
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    whole = len(text.encode())
    windows = load(path, byte_tokenizer(), samples=1, seqlen=whole - 1)
    assert torch.equal(windows.ids[0], torch.tensor(byte_tokenizer()(text)["input_ids"])[:-1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b" \n\t\n", "there is no text in this file"),
        ("a.txt", b"caf\xe9 " * 20, "not UTF-8"),
        ("a.txt", b"seven..", r"a.txt: the whole text has 7 tokens.*smaller `seqlen`"),
        ("a.txt", b"ten tokens", "only 2 different windows of 8 tokens, fewer than the 4 samples"),
        ("a.txt.gz", gzip.compress(b"some text " * 50, mtime=0)[:-12], "damaged or truncated gzip"),
        ("a.jsonl.gz", b"not gzip at all", "damaged or truncated gzip"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y', r"a.jsonl, line 3: not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "2: expected.* with text in 'text'"),
        ("a.jsonl", b'["x"]\n', "line 1: expected a JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1: not a JSON object"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1: not a JSON object"),
        ("a.jsonl", b'{"text": ""}\n', "there is no text"),
        ("a.safetensors", b"\x08\0\0\0\0\0\0\0{}", "not a readable safetensors file"),
        ("a.csv", b"text\nx\n", r"cannot tell what this file holds.*\.jsonl"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert_refused(ValueError, message, load, path, byte_tokenizer())


def test_files_without_text_or_ids(tmp_path):
    ids = torch.zeros(4, dtype=torch.int64)
    for tensors, message in (
        ({"ids": ids}, "no tensor 'input_ids'; it holds ids"),
        ({"input_ids": ids.float()}, r"\(windows, tokens\), not torch.float32 of shape \(4,\)"),
        ({"input_ids": ids}, r"not torch.int64 of shape \(4,\)"),
        ({"input_ids": ids.view(1, 4)[:0]}, "input_ids is empty"),
        ({"input_ids": ids.view(2, 2) - 100}, "negative id -100"),
    ):
        save_file(tensors, tmp_path / "bad.safetensors")
        assert_refused(ValueError, message, load, tmp_path / "bad.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: no such file"):
        check_source(str(tmp_path / "gone.jsonl"), None)


def test_token_ids_need_no_tokenizer(tmp_path):
    ids = torch.randint(0, 1000, (6, 20), dtype=torch.int32)
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": ids, "other": torch.zeros(1)}, path)
    windows = load(path, samples=4, seqlen=12)
    assert torch.equal(windows.ids, ids[:4, :12].long())
    assert windows.source == path.name
    assert_refused(
        ValueError, "it has 6 windows, fewer than `samples` 7", load, path, samples=7, seqlen=12
    )
    with pytest.raises(ValueError, match="its windows have 20 tokens, fewer than `seqlen` 21"):
        load(path, samples=2, seqlen=21)


# --- what every source refuses ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "c5"}, "unknown source 'c5': it is none of c4, wikitext2, ptb"),
        ({"tokenizer": None}, "python-docs is text, and this model comes without a tokenizer"),
        ({"source": "mix", "tokenizer": None}, "mix is text, and this model comes without a"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"source": "python-docs", "tokenizer": byte_tokenizer(), **change}
    assert_refused(ValueError, message, load, **arguments)


def test_hash_is_of_shape_and_little_endian_values():
    ids = torch.arange(12).view(3, 4) * 70_000
    pixels = ids.view(1, 3, 2, 2) / 7
    for values, shape, form in ((ids, b"3x4:", "<12i"), (pixels, b"1x3x2x2:", "<12f")):
        packed = struct.pack(form, *values.flatten().tolist())
        windows = find_source(values).draw(WindowRequest(seqlen=4))
        assert windows.sha256 == hashlib.sha256(shape + packed).hexdigest()


def test_a_small_file_of_endless_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("prunus.calibration.files._SMALL_TEXT", 10_000)
    for name, text in (("a.txt.gz", b"x" * 10**6), ("a.jsonl.gz", b'{"text": "x"}\n' * 10**5)):
        (tmp_path / name).write_bytes(gzip.compress(text))
        with pytest.raises(ValueError, match=r"bytes of text, which no ordinary text does"):
            read_documents(tmp_path / name)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"an ordinary text " * 10))
    assert read_documents(tmp_path / "a.txt.gz") == ["an ordinary text " * 10]


# --- the hub, where there may be no network ---


def answers(*_, **__):
    return io.BytesIO()


def answers_that_it_is_forbidden(*_, **__):
    raise urllib.error.HTTPError("https://hub", 403, "Forbidden", None, None)


def refuses(*_, **__):
    raise urllib.error.URLError(OSError("Tunnel connection failed: 403 Forbidden"))


def hangs(*_, **__):
    threading.Event().wait(60)


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (answers, ""),
        (answers_that_it_is_forbidden, ""),
        (refuses, "cannot be reached: Tunnel connection failed"),
        (hangs, "cannot be reached: no answer in 0.1 seconds"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_not_asked_again(ask, why, monkeypatch):
    datasets, seen = pytest.importorskip("datasets"), []

    def load_dataset(**_):
        seen.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", ask)
    monkeypatch.setattr("prunus.model.checkpoint.hub._WAIT", 0.1)
    monkeypatch.setattr("prunus.model.checkpoint.hub._last", {})
    monkeypatch.delenv("PRUNUS_DATA", raising=False)
    why = why or "no route"
    message = rf"c4 could not be loaded .*{why}.* need no network: python-docs, .*PRUNUS_DATA"
    assert_refused(OSError, message, load_corpus, "c4", "calibration", None)
    assert seen == [why != "no route"]
    assert datasets.config.HF_HUB_OFFLINE is False, "as it was"


# --- what windows begin with ---

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
        words = {"yes": "BOS first in every window", "no": "no BOS added to windows"}
        assert words[found.bos] in found.protocol
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

    assert_refused(
        ValueError, "`bos` is yes, and this tokenizer has no BOS token", bos_token, Without(), "yes"
    )
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
