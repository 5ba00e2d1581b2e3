"""How far a model's predictions are from a reference's, against slow and obvious figures."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import prunus
from command_line import call
from prunus.evaluation import metrics, window_scores
from prunus.evaluation import streamed_model as streamed
from prunus.evaluation.model_input import ComputeOptions
from prunus.evaluation.perplexity import first_scored_row
from prunus.methods.divergence import kl_divergence
from prunus.model.loading import load_model
from prunus.reporting.write import report
from tiny import pruned_checkpoint, tiny_checkpoint, token_ids
from tiny_tokenizer import BOS, VOCABULARY, byte_tokenizer, dense_checkpoint

#: Weights large enough for predictions that are far from uniform.
LARGE = {"initializer_range": 0.3}


def score(folders, model="pruned", reference="dense", **options):
    options = {"seqlen": 24, "dtype": "float32", "device": "cpu", **options}
    return prunus.perplexity(
        folders / model, str(folders / "ids.safetensors"), reference=folders / reference, **options
    )


def slow_figures(reference, model, ids, start=0):
    """All figures from the float64 probabilities of every token, one token after another."""
    kl, same, losses = [], [], []
    for window in ids:
        kl.append([])
        same.append([])
        losses.append([])
        with torch.no_grad():
            p, q = (
                torch.softmax(one(input_ids=window[None]).logits[0].double(), -1)
                for one in (reference, model)
            )
        for row in range(start, len(window) - 1):
            terms = [
                a * math.log(a / b) for a, b in zip(p[row].tolist(), q[row].tolist(), strict=True)
            ]
            kl[-1].append(math.fsum(terms))
            same[-1].append(float(p[row].argmax() == q[row].argmax()))
            losses[-1].append([-math.log(x[row, window[row + 1]]) for x in (p, q)])

    def error(means):
        return float(np.std(means, ddof=1) / math.sqrt(len(means)))

    before, after = np.mean(losses, axis=1).T
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


def test_every_figure_equals_the_slow_one(folders):
    models = [load_model(folders / name, torch.float32) for name in ("dense", "pruned")]
    expected = slow_figures(*models, token_ids(5, 24))
    found = score(folders)
    assert figures(found) == pytest.approx(expected, rel=1e-5)
    assert expected["kl"] > 0.05
    assert 0 < expected["same_top"] < 1
    assert found.perplexity == pytest.approx(
        expected["reference_perplexity"] * expected["perplexity_ratio"], rel=1e-5
    )
    assert found.divergence.reference == str(folders / "dense")


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


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
def test_streaming_gives_the_figures_of_whole_models(family, tmp_path):
    tiny_checkpoint(tmp_path / "dense", family)
    pruned_checkpoint(tmp_path / "pruned", family, torch.float32)
    save_file({"input_ids": token_ids(5, 24)}, tmp_path / "ids.safetensors")
    whole, parts = (score(tmp_path, batch=2, stream=stream) for stream in (False, True))
    assert (whole.streamed, parts.streamed) == (False, True)
    assert figures(parts) == pytest.approx(figures(whole), rel=1e-6, abs=1e-7)


def test_two_models_are_streamed_where_one_would_fit(folders, monkeypatch):
    monkeypatch.setattr(streamed, "process_memory", lambda: 0)
    dense = folders / "dense"
    need = streamed.whole_bytes(dense, 24, ComputeOptions("float32", torch.device("cpu")))
    chosen = [
        streamed.choose_streamed(
            [folders / name for name in names], None, 24,
            ComputeOptions("float32", torch.device("cpu"), memory),
        )
        for names, memory in (
            (["pruned"], need),
            (["pruned", "dense"], 2 * need),
            (["pruned", "dense"], 2 * need - 1),
        )
    ]  # fmt: skip
    assert chosen == [[False], [False, False], [True, True]]


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
    dense, pruned = (load_model(folders / name, torch.float32) for name in ("dense", "pruned"))
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
    models = [load_model(folders / name, torch.float32) for name in ("dense", "pruned")]
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
    model = load_model(dense)
    expected = slow_figures(model, model, ids, start=256)["reference_perplexity"]
    assert found.perplexity == pytest.approx(expected, rel=1e-5)


def test_protocols_and_windows_that_do_not_fit():
    assert first_scored_row("llama.cpp", 3) == 1
    with pytest.raises(ValueError, match="seqlen must be at least 3"):
        first_scored_row("llama.cpp", 2)
    with pytest.raises(ValueError, match="protocol: input should be"):
        prunus.perplexity("nowhere", "wikitext2", protocol="gptq")


# --- bad input ---


def test_references_that_do_not_fit(folders, tmp_path):
    larger = tiny_checkpoint(tmp_path / "larger", vocab_size=160)
    short = tiny_checkpoint(tmp_path / "short", max_position_embeddings=16)
    for reference, kind, words in (
        (larger, ValueError, r"reference .*larger has a vocabulary of 160 tokens, .*pruned one of"),
        (load_model(larger), ValueError, "a vocabulary of 160 tokens"),
        (short, ValueError, "longer than the reference's 16 positions"),
        (tmp_path / "none", FileNotFoundError, "neither a folder nor a hub id"),
        (tmp_path, FileNotFoundError, r"no config\.json"),
    ):
        ids = str(folders / "ids.safetensors")
        with pytest.raises(kind, match=words):
            prunus.perplexity(folders / "pruned", ids, seqlen=24, reference=reference)


def test_models_with_other_tokenizers(tmp_path):
    for name in ("dense", "pruned"):
        dense_checkpoint(tmp_path / name)
    save_file({"input_ids": token_ids(5, 24)}, tmp_path / "ids.safetensors")
    assert score(tmp_path).divergence.kl == 0
    path = tmp_path / "dense" / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the tokenizers of the reference .* differ, at 'a'"):
        score(tmp_path)


# --- the command line and the report ---


def test_eval_shows_and_writes_the_figures(folders, tmp_path):
    json_file, ids = tmp_path / "eval.json", folders / "ids.safetensors"
    second = tmp_path / "second.safetensors"
    save_file({"input_ids": token_ids(3, 24)}, second)
    models = [folders / "pruned", folders / "small"]
    options = ["--seqlen", 24, "--device", "cpu", "--dtype", "float32", "--json", json_file]
    texts = ["--perplexity", f"{ids},{second}", "--reference", folders / "dense"]
    shown = call("eval", *models, *texts, *options).stdout
    written = json.loads(json_file.read_text())["models"]
    expected = score(folders).as_dict() | {"seconds": 0}
    assert written[0]["perplexity"][0] | {"seconds": 0} == json.loads(json.dumps(expected))
    assert "Compared with dense: KL divergence" in " ".join(shown.split())
    for model in written:
        assert len(model["perplexity"]) == 3
        for one in model["perplexity"]:
            assert f"{one['divergence']['kl']:.5f} ± {one['divergence']['kl_stderr']:.5f}" in shown
    [section] = report([json_file]).sections
    [table] = [part for part in section.parts if part.title == "Quality and size"]
    texts = (ids, second, "all texts")
    names = [(model, text) for text in texts for model in ("pruned", "small")]
    assert [(row[0], row[1]) for row in table.rows] == [(model, str(t)) for model, t in names]
    assert table.columns[3].title == "KL divergence"
    assert table.rows[0][3].value == expected["divergence"]["kl"]
