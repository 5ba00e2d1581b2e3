"""Several models and their reference on several texts at once, against two whole models."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import prunus
from command_line import call
from prunus.evaluation.records import compare_on_texts
from prunus.evaluation.streamed_model import StreamedModel
from prunus.model.loading import load_model
from prunus.model.skeleton import Skeleton
from prunus.reporting.write import report
from tiny import pruned_checkpoint, tiny_checkpoint, token_ids
from tiny_tokenizer import VOCABULARY, byte_tokenizer

SEQLEN = 24
TEXTS = {"ids": token_ids(5, SEQLEN), "other": token_ids(3, SEQLEN)}
#: A chat template of the simplest kind.
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A dense model, two that were pruned, and two texts; no test writes to them."""
    root = tmp_path_factory.mktemp("models")
    tiny_checkpoint(root / "dense", initializer_range=0.3)
    for name, sparsity in (("half", 0.5), ("most", 0.8)):
        pruned_checkpoint(
            root / name, dtype=torch.float32, sparsity=sparsity, initializer_range=0.3
        )
    for name, ids in TEXTS.items():
        save_file({"input_ids": ids}, root / f"{name}.safetensors")
    return root


MODELS = ("half", "most")


def scored(root, texts=("ids", "other"), **options):
    """The results of both models on the texts."""
    options = {"seqlen": SEQLEN, "device": "cpu", "dtype": "float32", **options}
    files = [str(root / f"{text}.safetensors") for text in texts]
    models = [root / name for name in MODELS]
    return prunus.perplexities(models, files, reference=root / "dense", **options)


def slow_kl(root, name, ids):
    """KL of every predicted token (windows, tokens), from float64 probabilities of whole models."""
    rows = []
    models = [load_model(root / folder, torch.float32) for folder in ("dense", name)]
    for window in ids:
        with torch.no_grad():
            p, q = (
                torch.softmax(model(input_ids=window[None]).logits[0, :-1].double(), -1)
                for model in models
            )
        rows.append((p * (p / q).log()).sum(-1).numpy())
    return np.array(rows)


@pytest.mark.parametrize("stream", [False, True])
def test_figures_are_those_of_whole_models_per_text_and_over_all_texts(stream, root):
    for name, results in zip(MODELS, scored(root, stream=stream), strict=True):
        by_text = [slow_kl(root, name, ids) for ids in TEXTS.values()]
        for result, kl in zip(results, [*by_text, np.concatenate(by_text)], strict=True):
            found = result.divergence
            assert result.windows == len(kl)
            assert found.kl == pytest.approx(kl.mean(), rel=1e-5)
            error = kl.mean(axis=1).std(ddof=1) / len(kl) ** 0.5
            assert found.kl_stderr == pytest.approx(error, rel=1e-4)
            for share, figure in (
                (0.5, found.kl_median),
                (0.99, found.kl_q99),
                (0.999, found.kl_q999),
                (1, found.kl_max),
            ):
                assert figure == pytest.approx(np.quantile(kl, share), rel=1e-4)
        assert results[-1].source == "all texts"


def test_the_place_of_the_largest_divergence_is_named(root):
    for name, results in zip(MODELS, scored(root), strict=True):
        by_text = [slow_kl(root, name, ids) for ids in TEXTS.values()]
        for result, kl in zip(results, by_text, strict=False):
            place = result.divergence.kl_max_at
            window, row = np.unravel_index(kl.argmax(), kl.shape)
            # Row t of the logits predicts token t + 1.
            assert (place.window, place.token) == (window, row + 1)
            assert place.source == result.source
            assert place.text is None, "token ids have no text"
        largest = max(results[:-1], key=lambda result: result.divergence.kl_max)
        assert results[-1].divergence.kl_max_at == largest.divergence.kl_max_at


def test_the_text_around_the_largest_divergence_is_shown(tmp_path):
    for name in ("dense", "other"):
        options = {} if name == "dense" else {"initializer_range": 0.3}
        tiny_checkpoint(tmp_path / name, vocab_size=VOCABULARY, **options)
        byte_tokenizer().save_pretrained(tmp_path / name)
    text = "the quick brown fox jumps over the lazy dog and sleeps all day long"
    (tmp_path / "text.txt").write_text(text)
    found = prunus.perplexity(
        tmp_path / "other", str(tmp_path / "text.txt"), reference=tmp_path / "dense", seqlen=32
    )
    place = found.divergence.kl_max_at
    position = 32 * place.window + place.token
    assert place.text == text[position]
    assert place.before == text[32 * place.window : position][-12:]


def test_differences_are_taken_window_by_window(root):
    results = dict(zip(MODELS, scored(root), strict=True))
    changes = {(x.task, x.metric): x for x in compare_on_texts(results)}
    for text, ids in TEXTS.items():
        a, b = (slow_kl(root, name, ids).mean(axis=1) for name in MODELS)
        change = changes[str(root / f"{text}.safetensors"), "kl"]
        assert (change.model, change.than, change.paired) == (MODELS[1], MODELS[0], True)
        assert change.value == pytest.approx((b - a).mean(), rel=1e-4)
        assert change.stderr == pytest.approx((b - a).std(ddof=1) / len(a) ** 0.5, rel=1e-3)
    assert ("all texts", "kl") in changes
    loss = changes[str(root / "ids.safetensors"), "loss"]
    losses = [results[name][0].loss for name in MODELS]
    assert loss.value == pytest.approx(losses[1] - losses[0], rel=1e-6)


def test_models_without_a_reference_are_not_compared(root):
    results = prunus.perplexities(
        [root / name for name in MODELS], [str(root / "ids.safetensors")], seqlen=SEQLEN
    )
    assert compare_on_texts(dict(zip(MODELS, results, strict=True))) == []


def test_a_missing_model_is_named_before_another_is_scored(root):
    seen = []
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prunus.perplexities(
            [root / "dense", root / "nowhere"],
            [str(root / "ids.safetensors")],
            seqlen=SEQLEN,
            progress=lambda *step: seen.append(step),
        )
    assert not seen


def test_one_block_of_all_models_is_in_memory_and_no_file_of_logits(root, monkeypatch, tmp_path):
    filled, most = set(), []
    fill, release = Skeleton.fill, Skeleton.release

    def watched_fill(self, index, *rest):
        filled.add((id(self), index))
        most.append(len(filled))
        return fill(self, index, *rest)

    def watched_release(self, index):
        filled.discard((id(self), index))
        return release(self, index)

    monkeypatch.setattr(Skeleton, "fill", watched_fill)
    monkeypatch.setattr(Skeleton, "release", watched_release)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    scored(root, stream=True)
    blocks = len(load_model(root / "dense").model.layers)
    assert max(most) == 1
    assert len(most) == 3 * blocks * len(TEXTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stream", [False, True])
def test_eval_gives_each_model_the_figures_that_it_has_alone(stream, root, tmp_path, monkeypatch):
    runs = []
    run_blocks = StreamedModel._run_blocks
    monkeypatch.setattr(
        StreamedModel,
        "_run_blocks",
        lambda self, *rest: (
            runs.append(self.source.checkpoint.folder.name) or run_blocks(self, *rest)
        ),
    )
    json_file, names = tmp_path / "eval.json", ("dense", *MODELS)
    texts = [str(root / f"{text}.safetensors") for text in TEXTS]
    call(
        "eval",
        *(root / name for name in names),
        *("--reference", root / "dense", "--perplexity", ",".join(texts), "--seqlen", SEQLEN),
        *("--device", "cpu", "--json", json_file, "--stream" if stream else "--no-stream"),
    )
    # The reference comes first, and once for each text: `dense` is a model as well.
    assert runs == (["dense", *names] * len(TEXTS) if stream else [])
    for name, model in zip(names, json.loads(json_file.read_text())["models"], strict=True):
        for text, found in zip(texts, model["perplexity"], strict=False):
            options = {"seqlen": SEQLEN, "device": "cpu", "stream": stream}
            alone = prunus.perplexity(root / name, text, reference=root / "dense", **options)
            expected = json.loads(json.dumps(alone.as_dict()))
            assert found | {"seconds": 0} == expected | {"seconds": 0}
            assert (found["divergence"]["kl"] == 0) == (name == "dense")


def test_heads_of_all_models_count_where_they_would_not_fit(root, monkeypatch):
    needs = []
    original = StreamedModel._needs

    def watched(self, batch, shape, models):
        needs.append((models, original(self, batch, shape, models)[0]))
        return original(self, batch, shape, models)

    monkeypatch.setattr(StreamedModel, "_needs", watched)
    scored(root, texts=("ids",), stream=True)
    assert [models for models, _ in needs] == [3, 2, 1]
    assert needs[0][1] > needs[1][1] > needs[2][1]


def test_eval_shows_single_tokens_and_differences_everywhere(root, tmp_path):
    json_file, page = tmp_path / "eval.json", tmp_path / "eval.md"
    models = [root / name for name in MODELS]
    texts = ",".join(str(root / f"{text}.safetensors") for text in TEXTS)
    options = ["--seqlen", SEQLEN, "--device", "cpu", "--dtype", "float32", "--json", json_file]
    call("eval", *models, "--perplexity", texts, "--reference", root / "dense", *options)
    written = json.loads(json_file.read_text())
    changes = [x for x in written["text_differences"] if x["metric"] == "kl"]
    assert [x["task"] for x in changes] == [
        *(f"{root}/{t}.safetensors" for t in TEXTS),
        "all texts",
    ]
    [section] = report([json_file], page).sections
    tables = {part.title: part for part in section.parts if hasattr(part, "rows")}
    tokens = tables["Single tokens"]
    titles = [column.title for column in tokens.columns]
    assert titles == ["model", "text", "KL median", "KL 99 % quantile", "largest KL", "at"]
    assert tokens.rows[0][-1].startswith("window ")
    pairs = tables["Differences between models"]
    assert (pairs.rows[0][0], pairs.rows[0][1]) == (MODELS[1], MODELS[0])
    assert pairs.rows[0][3].value == changes[0]["value"] > 0
    markdown = page.read_text()
    sign = f"+{changes[0]['value']:.5f} ± {changes[0]['stderr']:.5f}"
    assert sign in markdown
    assert "| model | text | KL median |" in markdown


def test_chats_are_scored_in_the_template_of_the_model(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", vocab_size=VOCABULARY)
    tokenizer = byte_tokenizer()
    chats = [
        [{"role": "user", "content": f"How many? {n}"}, {"role": "assistant", "content": "Many."}]
        for n in range(4)
    ]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    file = str(tmp_path / "chats.jsonl")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        prunus.perplexity(dense, file, tokenizer=tokenizer, seqlen=16)
    tokenizer.chat_template = TEMPLATE
    found = prunus.perplexity(dense, file, tokenizer=tokenizer, seqlen=16)
    whole = "".join(f"<user>How many? {n}<assistant>Many." for n in range(4))
    assert found.windows == len(whole) // 16
    (tmp_path / "plain.txt").write_text(whole)
    plain = prunus.perplexity(dense, str(tmp_path / "plain.txt"), tokenizer=tokenizer, seqlen=16)
    assert found.loss == plain.loss
    assert "4 chats in the model's template" in found.protocol
    named = prunus.perplexity(dense, "chats", tokenizer=tokenizer, seqlen=16, samples=2)
    assert named.windows == 2


def test_protocol_llama_cpp_computes_in_float32(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", dtype=torch.bfloat16)
    save_file({"input_ids": token_ids(3, SEQLEN)}, tmp_path / "ids.safetensors")
    file = str(tmp_path / "ids.safetensors")
    found, rounded = (
        prunus.perplexity(dense, file, seqlen=SEQLEN, protocol="llama.cpp", dtype=dtype)
        for dtype in ("auto", "bfloat16")
    )
    assert found.protocol.endswith("float32")
    assert rounded.protocol.endswith("bfloat16")
