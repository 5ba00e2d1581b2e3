"""How far the predictions of one or several models are from a reference's, against slow figures."""

import dataclasses
import json
import math
import os
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import prunus
from changes import swap_two_tokens
from command_line import call
from prunus.evaluation import metrics, window_scores
from prunus.evaluation import streamed_model as streamed
from prunus.evaluation.eval_records import compare_on_texts
from prunus.evaluation.model_input import ComputeOptions
from prunus.evaluation.perplexity import first_scored_row
from prunus.evaluation.streamed_model import StreamedModel
from prunus.methods.divergence import kl_divergence
from prunus.model.loading import load_model
from prunus.model.open_folder import OpenFolder
from prunus.model.skeleton import Skeleton
from prunus.reporting.write import report
from refusals import assert_refused
from tiny import ids_file, pruned_checkpoint, tiny_checkpoint, token_ids
from tiny_tokenizer import BOS, VOCABULARY, byte_tokenizer, dense_checkpoint
from zeroshot_rows import LOCAL, write_local_datasets

#: Weights large enough for predictions that are far from uniform.
LARGE = {"initializer_range": 0.3}


def score(folders, model="pruned", reference="dense", **options):
    options = {"seqlen": 24, "dtype": "float32", "device": "cpu", **options}
    return prunus.perplexity(
        folders / model, str(folders / "ids.safetensors"), reference=folders / reference, **options
    )


def slow_tokens(reference, model, ids, start=0):
    """Of every predicted token: KL, whether the top token is the same, the losses of both models.

    They come from float64 probabilities of whole models: (4, windows, tokens).
    """
    found = []
    for window in ids:
        with torch.no_grad():
            p, q = (
                torch.softmax(one(input_ids=window[None]).logits[0, start:-1].double(), -1)
                for one in (reference, model)
            )
        losses = [-x.gather(1, window[start + 1 :, None])[:, 0].log() for x in (p, q)]
        same = (p.argmax(-1) == q.argmax(-1)).double()
        found.append(torch.stack([(p * (p / q).log()).sum(-1), same, *losses]))
    return torch.stack(found, dim=1).numpy()


def slow_figures(reference, model, ids, start=0):
    """All figures from those of every token."""
    kl, same, *losses = slow_tokens(reference, model, ids, start)

    def error(means):
        return float(np.std(means, ddof=1) / math.sqrt(len(means)))

    before, after = np.mean(losses, axis=2)
    ratio = math.exp(after.mean()) / math.exp(before.mean())
    return {
        "kl": float(np.mean(kl)),
        "kl_stderr": error(np.mean(kl, axis=1)),
        "kl_median": float(np.median(kl)),
        "kl_q99": float(np.quantile(kl, 0.99)),
        "kl_q999": float(np.quantile(kl, 0.999)),
        "kl_max": float(np.max(kl)),
        "same_top": float(np.mean(same)),
        "same_top_stderr": error(np.mean(same, axis=1)),
        "reference_perplexity": math.exp(before.mean()),
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": ratio * error(after - before),
    }


def figures(result):
    found = dataclasses.asdict(result.divergence)
    del found["reference"], found["kl_max_at"]
    return found


# --- the figures ---


def test_the_perplexity_is_that_without_a_reference(folders):
    for stream in (False, True):
        alone = prunus.perplexity(
            folders / "pruned", str(folders / "ids.safetensors"), seqlen=24, stream=stream
        )
        compared = score(folders, dtype="auto", device="auto", stream=stream)
        assert dataclasses.replace(compared, divergence=None, seconds=0) == dataclasses.replace(
            alone, seconds=0
        )


def test_a_model_does_not_differ_from_itself_and_one_window_has_no_errors(folders):
    found = figures(score(folders, "dense", "dense"))
    assert (found["kl"], found["kl_stderr"], found["kl_q999"]) == (0, 0, 0)
    assert (found["same_top"], found["same_top_stderr"]) == (1, 0)
    assert (found["perplexity_ratio"], found["perplexity_ratio_stderr"]) == (1, 0)
    single = figures(score(folders, samples=1))
    errors = {"kl_stderr", "same_top_stderr", "perplexity_ratio_stderr"}
    assert {name for name, value in single.items() if value is None} == errors


def test_pieces_and_batches_change_nothing(folders, monkeypatch):
    whole = figures(score(folders))
    monkeypatch.setattr("prunus.evaluation.window_scores.ROWS", 7)
    monkeypatch.setattr(window_scores, "_PIECE", 3)
    assert figures(score(folders, batch=3)) == pytest.approx(whole, rel=1e-4)


def test_single_tokens_and_quantiles():
    out = -math.inf
    # A token that the reference rules out adds nothing.
    p, q = torch.tensor([[0.0, 0.0, out], [0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, out]] * 2)
    assert kl_divergence(p, q).tolist() == [0, math.inf]
    assert metrics.same_top(p, q).tolist() == [True, True]
    kl = kl_divergence(p[:1], torch.zeros(1, 3))
    assert kl.item() == pytest.approx(math.log(1.5))
    # A sum of so many probabilities in float32 would be wrong by more than the divergence.
    x = (4 * torch.randn(8, 30_000)).bfloat16()
    y = (x.float() + 1e-3 * torch.randn(x.shape)).bfloat16()
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (x, y))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert 0 < expected.mean() < 1e-6
    found = kl_divergence(x, y)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-2)
    values = torch.rand(1234, dtype=torch.float64)
    for share in (0.0, 0.5, 0.999, 1.0):
        quantile = np.quantile(values.numpy(), share)
        assert metrics.quantile(share, values[None]) == pytest.approx(quantile, rel=1e-12)


def test_progress_counts_both_models(folders):
    seen = []
    score(folders, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (5, 5)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# --- kinds of models ---


def test_two_models_are_streamed_where_one_would_fit(folders, monkeypatch):
    kept = []
    monkeypatch.setattr(streamed, "process_memory", lambda: 0)
    monkeypatch.setattr(streamed, "keep_freed_memory", lambda: kept.append(True))
    dense = folders / "dense"
    need = streamed.whole_bytes(
        OpenFolder(dense), 24, ComputeOptions("float32", torch.device("cpu"))
    )
    chosen = [
        streamed.choose_streamed(
            [OpenFolder(folders / name) for name in names], None, 24,
            ComputeOptions("float32", torch.device("cpu"), memory),
        )
        for names, memory in (
            (["pruned"], need),
            (["pruned", "dense"], 2 * need),
            (["pruned", "dense"], 2 * need - 1),
            (["pruned"], 2 * need),
        )
    ]  # fmt: skip
    assert chosen == [[False], [False, False], [True, True], [False]]
    # Freed memory has gaps, so only the last budget has room to keep it.
    assert kept == [True]


def test_states_of_compared_models_leave_half_of_the_memory(folders, monkeypatch):
    spilled = []
    embed = streamed.Stream.embed

    def watched(self, batches, spill_to, **options):
        spilled.append(spill_to is not None)
        embed(self, batches, spill_to, **options)

    monkeypatch.setattr(streamed.Stream, "embed", watched)
    kept = figures(score(folders, stream=True))
    monkeypatch.setattr(streamed, "memory_budget", lambda *_: 50)
    monkeypatch.setattr(streamed, "process_memory", lambda: 0)
    monkeypatch.setattr(streamed.StreamedModel, "_needs", lambda *_: (40, 20))
    assert figures(score(folders, stream=True)) == kept
    assert spilled == [False, False, True, True]


def test_a_whole_model_beside_a_streamed_reference(folders, monkeypatch):
    found = figures(score(folders, "small", dtype="auto"))
    assert found["kl"] < 1e-2 < figures(score(folders, dtype="auto"))["kl"]
    choose = streamed.choose_streamed
    monkeypatch.setattr(
        sys.modules["prunus.evaluation.perplexity"],
        "choose_streamed",
        lambda *given: choose(*given) and [False, True],
    )
    assert figures(score(folders, "small", dtype="auto")) == pytest.approx(found, rel=1e-6)


def test_loaded_models_are_compared_and_left_as_they_were(folders):
    expected = figures(score(folders))
    dense, pruned = (
        load_model(OpenFolder(folders / name), torch.float32) for name in ("dense", "pruned")
    )
    dense.train()
    ids = str(folders / "ids.safetensors")
    found = prunus.perplexity(pruned, ids, seqlen=24, reference=dense)
    assert figures(found) == expected
    assert dense.training
    assert not pruned.training
    folder = prunus.perplexity(
        folders / "pruned", ids, seqlen=24, dtype="float32", device="cpu", reference=dense
    )
    assert figures(folder) == expected


# --- the protocol of llama.cpp ---


def test_llama_cpp_scores_the_second_half_of_every_window(folders):
    models = [load_model(OpenFolder(folders / name), torch.float32) for name in ("dense", "pruned")]
    expected = slow_figures(*models, token_ids(5, 24), start=12)
    for stream in (False, True):
        found = score(folders, protocol="llama.cpp", stream=stream)
        assert figures(found) == pytest.approx(expected, rel=1e-4)
        alone = prunus.perplexity(
            folders / "dense",
            str(folders / "ids.safetensors"),
            protocol="llama.cpp",
            seqlen=24,
            dtype="float32",
            stream=stream,
        )
        assert alone.perplexity == pytest.approx(expected["reference_perplexity"], rel=1e-5)
        assert "scored from token 14 of each on" in alone.protocol


@pytest.mark.parametrize("bos", [False, True])
def test_llama_cpp_puts_bos_first_where_the_tokenizer_does(bos, tmp_path):
    dense = tiny_checkpoint(
        tmp_path / "dense", vocab_size=VOCABULARY, max_position_embeddings=512, **LARGE
    )
    text = "The quick brown fox jumps over the lazy dog; " * 40
    (tmp_path / "text.txt").write_text(text)
    tokenizer = byte_tokenizer(bos=bos)
    found = prunus.perplexity(
        dense, str(tmp_path / "text.txt"), protocol="llama.cpp", tokenizer=tokenizer
    )
    assert (found.seqlen, found.windows) == (512, 3)
    assert ("BOS first in every window" in found.protocol) == bos
    ids = torch.tensor(tokenizer(text)["input_ids"])[:1536].view(3, 512)
    if bos:
        ids[:, 0] = BOS
    model = load_model(OpenFolder(dense))
    expected = slow_figures(model, model, ids, start=256)["reference_perplexity"]
    assert found.perplexity == pytest.approx(expected, rel=1e-5)


def test_protocols_and_windows_that_do_not_fit():
    assert first_scored_row("llama.cpp", 3) == 1
    assert_refused(ValueError, "seqlen must be at least 3", first_scored_row, "llama.cpp", 2)
    with pytest.raises(ValueError, match="protocol: input should be"):
        prunus.perplexity("nowhere", "wikitext2", protocol="gptq")


# --- bad input ---


def test_references_that_do_not_fit(folders, tmp_path):
    larger = tiny_checkpoint(tmp_path / "larger", vocab_size=160)
    short = tiny_checkpoint(tmp_path / "short", max_position_embeddings=16)
    for reference, kind, words in (
        (larger, ValueError, r"reference .*larger has a vocabulary of 160 tokens, .*pruned one of"),
        (load_model(OpenFolder(larger)), ValueError, "a vocabulary of 160 tokens"),
        (short, ValueError, "the reference has 16 positions"),
        (tmp_path / "none", FileNotFoundError, "neither a folder nor a hub id"),
        (tmp_path, FileNotFoundError, r"no config\.json"),
    ):
        ids = str(folders / "ids.safetensors")
        assert_refused(
            kind, words, prunus.perplexity, folders / "pruned", ids, seqlen=24, reference=reference
        )


def test_models_with_other_tokenizers(tmp_path):
    for name in ("dense", "pruned"):
        dense_checkpoint(tmp_path / name)
    ids_file(tmp_path / "ids.safetensors", 5, 24)
    assert score(tmp_path).divergence.kl == 0
    swap_two_tokens(tmp_path / "dense")
    assert_refused(
        ValueError, r"the tokenizers of the reference .* differ, at 'a'", score, tmp_path
    )


# --- several models and texts at once ---

SEQLEN = 24
TEXTS = {"ids": token_ids(5, SEQLEN), "other": token_ids(3, SEQLEN)}
#: A chat template of the simplest kind.
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def root(folders):
    """The same with a model that lost more, and with a second text."""
    pruned_checkpoint(folders / "most", sparsity=0.8, **LARGE)
    save_file({"input_ids": TEXTS["other"]}, folders / "other.safetensors")
    return folders


MODELS = ("pruned", "most")


def scored(root, texts=("ids", "other"), **options):
    """The results of both models on the texts."""
    options = {"seqlen": SEQLEN, "device": "cpu", "dtype": "float32", **options}
    files = [str(root / f"{text}.safetensors") for text in texts]
    models = [root / name for name in MODELS]
    return prunus.perplexities(models, files, reference=root / "dense", **options)


def slow_kl(root, name, ids):
    """KL of every predicted token (windows, tokens)."""
    models = [load_model(OpenFolder(root / folder), torch.float32) for folder in ("dense", name)]
    return slow_tokens(*models, ids)[0]


@pytest.mark.parametrize("stream", [False, True])
def test_figures_are_those_of_whole_models_per_text_and_over_all_texts(stream, root):
    texts = [*TEXTS.values()]
    dense, *models = (
        load_model(OpenFolder(root / name), torch.float32) for name in ("dense", *MODELS)
    )
    for model, results in zip(models, scored(root, stream=stream), strict=True):
        for result, ids in zip(results, (*texts, torch.cat(texts)), strict=True):
            expected = slow_figures(dense, model, ids)
            assert (result.windows, result.divergence.reference) == (len(ids), str(root / "dense"))
            assert figures(result) == pytest.approx(expected, rel=1e-4)
            perplexity = expected["reference_perplexity"] * expected["perplexity_ratio"]
            assert result.perplexity == pytest.approx(perplexity, rel=1e-5)
            assert expected["kl"] > 0.05 and 0 < expected["same_top"] < 1
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
        dense_checkpoint(tmp_path / name, **options)
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
    blocks = len(load_model(OpenFolder(root / "dense")).model.layers)
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


def test_eval_shows_and_writes_figures_single_tokens_and_differences(root, tmp_path):
    json_file, page = tmp_path / "eval.json", tmp_path / "eval.md"
    models = [root / name for name in MODELS]
    texts = [str(root / f"{text}.safetensors") for text in TEXTS]
    options = ["--seqlen", SEQLEN, "--device", "cpu", "--dtype", "float32", "--json", json_file]
    given = ["--perplexity", ",".join(texts), "--reference", root / "dense"]
    shown = call("eval", *models, *given, *options).stdout
    written = json.loads(json_file.read_text())
    first = written["models"][0]["perplexity"][0]
    expected = score(root).as_dict() | {"seconds": first["seconds"]}
    assert first == json.loads(json.dumps(expected))
    assert "Compared with dense: KL divergence" in " ".join(shown.split())
    for model in written["models"]:
        assert len(model["perplexity"]) == 3
        for one in model["perplexity"]:
            assert f"{one['divergence']['kl']:.5f} ± {one['divergence']['kl_stderr']:.5f}" in shown
    changes = [x for x in written["text_differences"] if x["metric"] == "kl"]
    assert [x["task"] for x in changes] == [*texts, "all texts"]
    [section] = report([json_file], page).sections
    tables = {part.title: part for part in section.parts if hasattr(part, "rows")}
    quality = tables["Quality and size"]
    names = [(model, text) for text in (*texts, "all texts") for model in MODELS]
    assert [(row[0], row[1]) for row in quality.rows] == names
    assert quality.columns[3].title == "KL divergence"
    assert quality.rows[0][3].value == first["divergence"]["kl"]
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
    # Beside the dense model, the same top token is a share, as llama-perplexity prints it.
    beside = call("eval", root / "dense", models[0], *given, *options[:-2]).stdout
    share = first["divergence"]
    assert f"{share['same_top']:.2%} ± {share['same_top_stderr']:.2%}" in beside
    assert f"-{1 - share['same_top']:.2%}" not in beside


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
    file = str(ids_file(tmp_path / "ids.safetensors", 3, SEQLEN))
    found, rounded = (
        prunus.perplexity(dense, file, seqlen=SEQLEN, protocol="llama.cpp", dtype=dtype)
        for dtype in ("auto", "bfloat16")
    )
    assert found.protocol.endswith("float32")
    assert rounded.protocol.endswith("bfloat16")


# --- checkpoints that change ---


def cut_short(folder):
    """A page that a mapped file has no more would kill the process."""
    for path in folder.glob("*.safetensors"):
        os.truncate(path, min(path.stat().st_size, 4096))


def change(folder):
    """Write other bytes over the last weights in a file, as a second program would do."""
    path = max(folder.glob("*.safetensors"))
    with path.open("r+b") as file:
        file.seek(-8, 2)
        file.write(bytes(8))


@pytest.fixture
def copies(folders, tmp_path):
    for name in ("dense", "pruned"):
        shutil.copytree(folders / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("model", "changed", "stream"),
    [
        ("pruned", "pruned", False),
        ("pruned", "pruned", True),
        ("pruned", "dense", False),
        ("pruned", "dense", True),
    ],
)
@pytest.mark.parametrize("how", [change, cut_short])
def test_perplexity(model, changed, stream, how, copies, folders):
    seen = []

    def progress(done, of):
        if not seen:
            how(copies / changed)
        seen.append(done)

    reference = copies / "dense" if changed == "dense" else None
    with pytest.raises(ValueError, match=rf"{changed}/.*\.safetensors was changed"):
        prunus.perplexity(
            copies / model,
            str(folders / "ids.safetensors"),
            reference=reference,
            seqlen=24,
            device="cpu",
            stream=stream,
            progress=progress,
        )
    assert seen


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra eval")
@pytest.mark.filterwarnings("ignore")
def test_tasks(tmp_path, monkeypatch):
    dense = dense_checkpoint(tmp_path / "m", max_position_embeddings=1024)
    data = write_local_datasets(tmp_path / "data")
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda *_, **__: change(dense) or {}["rte"])
    with pytest.raises(ValueError, match=r"m/model\.safetensors was changed"):
        prunus.evaluate(dense, "rte", data=data, include_path=LOCAL, limit=2)
