"""Perplexity of whole models and block by block, and the texts it is measured on."""

import gzip
import hashlib
import json
import logging
import math
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

import prunus
from changes import edit_json
from prunus.calibration.corpora import python_code, python_docs
from prunus.evaluation import streamed_model as streamed
from prunus.evaluation.model_input import ComputeOptions
from prunus.evaluation.perplexity import load_scoring_text, perplexities, perplexity
from prunus.evaluation.window_scores import WholeModel, score_windows
from prunus.model.checkpoint.tensor_files import Checkpoint
from prunus.model.open_folder import OpenFolder
from refusals import assert_refused
from tiny import ids_file, tiny_checkpoint, tiny_model, token_ids
from tiny_tokenizer import BOS, EOS, VOCABULARY, byte_tokenizer

SENTENCES = "The quick brown fox jumps over the lazy dog; " * 12


@pytest.fixture
def model():
    return tiny_model(
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.3,
    )


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(SENTENCES)
    return path


def slow_loss(model, ids: torch.Tensor) -> float:
    """The loss token by token in float64: a mean per window, then the mean over windows."""
    losses = []
    for window in ids:
        terms = []
        for position in range(1, len(window)):
            with torch.no_grad():
                logits = model(input_ids=window[None, :position]).logits[0, -1].double()
            terms.append(-torch.log_softmax(logits, dim=-1)[window[position]].item())
        losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses)


# --- the loss ---


def test_against_token_by_token_scoring(model, text_file):
    result = perplexity(model, str(text_file), tokenizer=byte_tokenizer(), seqlen=25, samples=4)
    ids = torch.tensor(byte_tokenizer()(SENTENCES)["input_ids"])[:100].view(4, 25)
    expected = slow_loss(model, ids)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert (result.windows, result.seqlen, result.tokens, result.bos) == (4, 25, 100, "no")
    assert "4 windows of 25 tokens without overlap (100 tokens)" in result.protocol
    assert "float32" in result.protocol
    assert result.source == str(text_file)
    assert json.loads(json.dumps(result.as_dict()))["tokens"] == 100


def test_windows_do_not_overlap_and_the_rest_is_dropped(model, text_file):
    tokens = len(SENTENCES.encode())
    result = perplexity(model, str(text_file), tokenizer=byte_tokenizer(), seqlen=77)
    assert result.windows == tokens // 77
    assert tokens % 77 != 0
    ids = torch.tensor(byte_tokenizer()(SENTENCES)["input_ids"])[: 77 * result.windows].view(-1, 77)
    expected = score_windows([WholeModel(model)], ids)[0].loss
    assert result.loss == pytest.approx(expected, rel=1e-6)


def test_the_loss_does_not_depend_on_the_batch(model):
    ids = torch.randint(0, VOCABULARY, (7, 20))
    seen = []
    losses = [
        score_windows(
            [WholeModel(model)], ids, batch=batch, progress=lambda *step: seen.append(step)
        )[0].loss
        for batch in (1, 3, 7, 50)
    ]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    assert seen[7:10] == [(3, 7), (6, 7), (7, 7)]


def test_a_loaded_model_finds_its_tokenizer_and_is_left_as_it_was(model, text_file, tmp_path):
    options = {"seqlen": 32, "samples": 1}
    expected = perplexity(model, str(text_file), tokenizer=byte_tokenizer(), **options)
    for each in (model, byte_tokenizer()):
        each.save_pretrained(tmp_path / "model")
    model.name_or_path = str(tmp_path / "model")
    model.train()
    assert perplexity(model, str(text_file), **options).loss == expected.loss
    assert model.training


def test_a_folder_scores_as_the_loaded_model(model, text_file, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    loaded = perplexity(model, str(text_file), tokenizer=byte_tokenizer(), seqlen=32)
    stored = perplexity(str(folder), str(text_file), seqlen=32, device="cpu")
    assert stored.loss == loaded.loss
    assert stored.protocol == loaded.protocol
    half = perplexity(folder, str(text_file), seqlen=32, dtype="bfloat16", device="cpu")
    assert half.loss != stored.loss
    assert half.loss == pytest.approx(stored.loss, rel=0.05)
    assert half.protocol.endswith("bfloat16")


def test_no_warning_about_long_texts(model, text_file, caplog):
    logger = logging.getLogger("transformers")
    caplog.set_level(logging.WARNING, logger="transformers")  # whatever was imported before
    logger.addHandler(caplog.handler)
    try:
        tokenizer = byte_tokenizer(max_length=16)
        perplexity(model, str(text_file), tokenizer=tokenizer, seqlen=16, samples=1)
        assert not caplog.records
        tokenizer(SENTENCES)  # this is what would have been printed
        assert "longer than the specified maximum" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_token_ids_need_no_tokenizer(model, tmp_path):
    ids = torch.randint(0, VOCABULARY, (3, 50), dtype=torch.int32)
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": ids}, path)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    result = perplexity(folder, str(path), seqlen=20, device="cpu")
    assert result.windows == 6
    pieces = torch.cat([torch.stack([row[:20], row[20:40]]) for row in ids.long()])
    expected = score_windows([WholeModel(model)], pieces)[0].loss
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert perplexity(folder, str(path), seqlen=50, samples=2, device="cpu").windows == 2
    with pytest.raises(ValueError, match="its rows have 50 tokens, less than a window of 51"):
        perplexity(folder, str(path), seqlen=51, device="cpu")
    given = perplexity(folder, ids, device="cpu")
    assert (given.windows, given.seqlen, given.source, given.bos) == (3, 50, "token ids", "given")
    assert given.loss == perplexity(folder, str(path), seqlen=50, device="cpu").loss
    assert perplexity(folder, ids, seqlen=20, device="cpu").loss == result.loss
    assert given.loss == prunus.perplexity(model, ids).loss
    (first, second, both), *_ = perplexities([folder], [ids, ids + 1], device="cpu")
    assert both.loss == pytest.approx((first.loss + second.loss) / 2)


def test_a_list_of_texts_scores_as_the_file_of_its_documents(model, tmp_path):
    documents = [SENTENCES, SENTENCES[::-1], "The end."]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    how = {"tokenizer": byte_tokenizer(), "seqlen": 32}
    expected = perplexity(model, str(path), **how)
    for given in (documents, [{"text": document} for document in documents]):
        result = perplexity(model, given, **how)
        assert (result.loss, result.windows) == (expected.loss, expected.windows)
        assert result.source == "texts"
        assert "3 texts joined with blank lines" in result.protocol


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seqlen": 1}, "seqlen must be at least 2"),
        ({"samples": 0}, "samples must be at least 1 window"),
        ({"batch": 0}, "batch must be 'auto' or at least 1"),
        ({"dtype": "int8"}, "dtype: input should be"),
        ({"dtype": "float32"}, "a loaded model is scored as it is"),
        ({"device": "cpu"}, "a loaded model is scored as it is"),
        (
            {"text": "wikitext"},
            "unknown text 'wikitext': give c4, wikitext2, ptb, python-docs, python-code, chats",
        ),
        ({"text": "self"}, "unknown text 'self'"),
        ({"text": torch.zeros(3, 4)}, r"token ids must be integers .*, got torch.float32 \(3, 4\)"),
        ({"text": torch.zeros(1, 3, 4, 4)}, "on text or token ids, not on pixel values"),
        ({"text": torch.full((2, 32), 10**6)}, "the model's embedding has"),
        ({"tokenizer": None}, "a loaded model needs its tokenizer"),
        (
            {"seqlen": 2000},
            r"the text has 540 tokens, less than a window of 2000; use a smaller `seqlen`",
        ),
    ],
)
def test_bad_arguments(model, text_file, change, message):
    arguments = {"text": str(text_file), "tokenizer": byte_tokenizer(), "seqlen": 32, **change}
    assert_refused(ValueError, message, perplexity, model, **arguments)


def test_losses_that_are_not_finite_or_beyond_exp(model, text_file):
    options = {"tokenizer": byte_tokenizer(), "seqlen": 32, "samples": 1}
    weight = model.lm_head.weight
    with torch.no_grad():
        weight.mul_(1e5)
    result = perplexity(model, str(text_file), **options)
    assert result.loss > 1000
    assert result.perplexity == math.inf and result.as_dict()["perplexity"] is None
    with torch.no_grad():
        model.model.norm.weight.fill_(1e38)
    with pytest.raises(ValueError, match=r"the loss of window 0 is (nan|inf)"):
        perplexity(model, str(text_file), **options)


def test_weights_that_are_not_finite_are_named(model, text_file, tmp_path):
    options = {"tokenizer": byte_tokenizer(), "seqlen": 32, "samples": 1}
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = torch.nan
    model.save_pretrained(tmp_path)
    for given, stream in ((model, False), (tmp_path, False), (tmp_path, True)):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight .* not finite"):
            perplexity(given, str(text_file), stream=stream, **options)


# --- the texts ---


def test_wikitext2_is_the_text_that_papers_score(data):
    scoring = load_scoring_text("wikitext2", data)
    encoded = scoring.text.encode()
    assert len(encoded) == 1_296_370
    expected = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
    assert hashlib.sha256(encoded).hexdigest() == expected
    assert "WARNING" not in scoring.protocol


def test_another_wikitext2_is_scored_with_a_warning(tmp_path):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(" \n = Title = \n \n Words . \n")
    scoring = load_scoring_text("wikitext2", tmp_path)
    assert scoring.text == "\n\n = Title = \n\n\n\n\n Words . \n"
    assert "WARNING: not the text that papers score" in scoring.protocol


def test_texts_from_the_hub(monkeypatch, model):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(**arguments):
        asked.append(arguments)
        c4 = [f"d{i}" for i in range(1300)]
        lines = ["", " = Title = \n", "", " Words . \n"]
        return datasets.Dataset.from_dict({"text": c4 if "c4" in arguments["path"] else lines})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_scoring_text("wikitext2").text == "\n\n = Title = \n\n\n\n\n Words . \n"
    expected = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}
    assert asked == [expected]
    # Of C4, 1100 documents and 256 windows.
    scoring = load_scoring_text("c4")
    assert scoring.text == " ".join(f"d{i}" for i in range(1100))
    assert asked[1]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert asked[1]["split"] == "validation"
    options = {"tokenizer": byte_tokenizer(), "seqlen": 16, "batch": 64}
    assert len(scoring.text) // 16 > 256
    assert perplexity(model, "c4", **options).windows == 256
    assert perplexity(model, "c4", samples=3, **options).windows == 3


def test_c4_from_a_data_folder_is_not_the_calibration_text(tmp_path):
    (tmp_path / "c4").mkdir()
    lines = "\n".join(
        json.dumps({"prefix": f"start {i} ", "gold_completion": "end"}) for i in range(3)
    )
    (tmp_path / "c4" / "c4_en_1480_prefix_completion.jsonl.gz").write_bytes(
        gzip.compress(lines.encode())
    )
    scoring = load_scoring_text("c4", tmp_path)
    assert scoring.text == "start 0 end start 1 end start 2 end"
    assert "not the validation shard" in scoring.source


def test_how_documents_are_joined(tmp_path):
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.test.txt").write_text(" a b \n c <unk> \n")
    assert load_scoring_text("ptb", tmp_path).text == "a b c <unk>"
    for name, read in (("python-docs", python_docs), ("python-code", python_code)):
        assert load_scoring_text(name).text == "\n\n".join(read("scoring"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    scoring = load_scoring_text(str(path))
    assert scoring.text == "one\n\ntwo"
    assert "2 documents" in scoring.protocol


# --- block by block ---


@pytest.fixture
def ids(tmp_path):
    return str(ids_file(tmp_path / "ids.safetensors", 7, 24))


def score(folder, ids, **options):
    return prunus.perplexity(folder, ids, seqlen=24, device="cpu", **options)


#: Embeddings and heads of every form: scaled, capped, with biases, projections, positions, norms.
FAMILIES = """
bloom codegen cohere falcon_h1 gemma2 gemma4_text gpt2 gpt_neox granite llama mamba mpt opt phi
qwen3_5_text
"""


@pytest.mark.parametrize("family", FAMILIES.split())
def test_streaming_gives_the_perplexity_of_the_whole_model(family, ids, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family)
    whole = score(dense, ids, batch=2, stream=False)
    parts = score(dense, ids, batch=2, stream=True)
    assert (whole.streamed, parts.streamed) == (False, True)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (parts.windows, parts.protocol) == (whole.windows, whole.protocol)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_streaming_gives_the_same_bits(tied, dtype, ids, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16, tie_word_embeddings=tied)
    losses = {score(dense, ids, dtype=dtype, stream=stream).loss for stream in (False, True)}
    assert len(losses) == 1


def test_every_tensor_is_read_once(monkeypatch, ids, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", tie_word_embeddings=False)
    seen: Counter[str] = Counter()
    original = Checkpoint.read

    def counting(self, names, *options):
        names = list(names)
        seen.update(names)
        return original(self, names, *options)

    monkeypatch.setattr(Checkpoint, "read", counting)
    score(dense, ids, stream=True)
    # Final norm and rotary tables come with the embedding and with the head.
    assert {name for name, count in seen.items() if count > 1} == {"model.norm.weight"}
    assert set(seen) == set(Checkpoint(dense).tensors)


def test_what_does_not_fit_is_streamed_and_what_does_is_not(monkeypatch, ids, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", hidden_size=64, num_hidden_layers=12)
    monkeypatch.setattr(streamed, "process_memory", lambda: 0)
    need = streamed.whole_bytes(OpenFolder(dense), 24, ComputeOptions("auto", torch.device("cpu")))
    large = sum(path.stat().st_size for path in dense.glob("*.safetensors"))
    assert large < need < 2 * large
    assert not score(dense, ids, memory=need).streamed
    assert score(dense, ids, memory=need - 1).streamed
    assert score(dense, ids, memory=f"{need // 2048}KB").streamed
    with pytest.raises(ValueError, match=r"block by block needs .* the memory budget is .* Raise"):
        score(dense, ids, memory=large // 12)


def test_compressed_models_are_streamed_and_quantised_ones_of_other_programs_are_not(ids, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16)
    prunus.compress(dense, tmp_path / "small", 8, calibration=token_ids())
    whole = score(tmp_path / "small", ids, stream=False)
    assert score(tmp_path / "small", ids, stream=True).loss == whole.loss
    edit_json(dense / "config.json", quantization_config={"quant_method": "hqq"})
    assert_refused(
        ValueError, "is quantised, which is scored with the whole", score, dense, ids, stream=True
    )
