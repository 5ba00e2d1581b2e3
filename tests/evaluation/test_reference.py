"""The reference of a comparison: run once for each text, with the figures of two whole models."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

import prunus
from command_line import call
from packed_reference import pruned_checkpoint
from prunus.evaluation.model_input import ComputeOptions
from prunus.evaluation.reference import Reference
from prunus.evaluation.streamed_model import StreamedModel
from prunus.evaluation.window_scores import WholeModel, score_windows
from prunus.model.loading import load_model
from prunus.model.stream import HiddenStates, StatesPlace
from tiny import tiny_checkpoint, token_ids

LARGE = {"initializer_range": 0.3}
MODELS = ("dense", "pruned", "packed")


@pytest.fixture
def runs(monkeypatch):
    """The folder of a model, for each time that all its blocks ran, one after the other."""
    folders = []
    original = StreamedModel.run_blocks

    def watched(self, *arguments):
        folders.append(self.source.checkpoint.folder.name)
        return original(self, *arguments)

    monkeypatch.setattr(StreamedModel, "run_blocks", watched)
    return folders


def score(folders, model, reference, text="ids", **options):
    options = {"seqlen": 24, "batch": 2, "device": "cpu", **options}
    ids = str(folders / f"{text}.safetensors")
    one = folders / model if isinstance(model, str) else model
    return prunus.perplexity(one, ids, reference=reference, **options)


def without_seconds(result):
    return dataclasses.replace(result, seconds=0)


def side_by_side(folders, model, ids):
    """The divergence of two whole models that compute at the same time."""
    dense, other = (WholeModel(load_model(folders / name)) for name in ("dense", model))
    [scores] = score_windows([other], ids, reference=dense, batch=2)
    return scores.divergence(str(folders / "dense"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gptj", "mixtral", "gpt_oss"])
def test_figures_are_those_of_two_models_side_by_side(family, tmp_path, runs):
    """To the last bit, and so for experts, whose products depend on how they are called."""
    for dtype in (torch.float32, torch.bfloat16):
        root = tmp_path / str(dtype)
        tiny_checkpoint(root / "dense", family, dtype)
        pruned_checkpoint(root / "pruned", family, dtype)
        save_file({"input_ids": token_ids(5, 24)}, root / "ids.safetensors")
        expected = side_by_side(root, "pruned", token_ids(5, 24))
        with Reference(root / "dense") as reference:
            found = [score(root, "pruned", reference).divergence for _ in range(2)]
        assert [dataclasses.replace(one, kl_max_at=None) for one in found] == [expected] * 2
    # Experts would run one by one in another order than together.
    assert runs == ([] if family in ("mixtral", "gpt_oss") else ["dense", "dense"])


@pytest.mark.parametrize("stream", [False, True])
def test_the_reference_runs_once_for_each_text(stream, folders, runs):
    models = MODELS[:2] if stream else MODELS
    with Reference(folders / "dense") as reference:
        found = {
            (text, model): score(folders, model, reference, text, stream=stream)
            for text in ("ids", "other")
            for model in models
        }
    # A streamed model, too, runs its blocks one after the other: `dense` is a model as well.
    assert runs.count("dense") == (4 if stream else 2)
    for (text, model), result in found.items():
        alone = score(folders, model, folders / "dense", text, stream=stream)
        assert without_seconds(result) == without_seconds(alone)
    assert found["ids", "dense"].divergence.kl == 0


def test_another_batch_or_dtype_runs_again(folders, runs):
    with Reference(folders / "dense") as reference:
        for options in ({}, {"batch": 1}, {"dtype": "float32"}, {"samples": 2}):
            found = score(folders, "pruned", reference, **options)
            alone = score(folders, "pruned", folders / "dense", **options)
            assert found.divergence == alone.divergence
    assert len(runs) == 4


def test_a_reference_scores_itself_without_a_second_run(folders, runs):
    alone = score(folders, "dense", None)
    with Reference(folders / "dense") as reference:
        found = score(folders, reference, None)
        compared = score(folders, "pruned", reference).divergence
    assert without_seconds(found) == without_seconds(alone)
    assert compared.reference_perplexity == pytest.approx(alone.perplexity, rel=1e-12)
    assert runs == ["dense"]


def test_hidden_states_that_do_not_fit_wait_in_a_file(folders, monkeypatch, tmp_path):
    expected = score(folders, "pruned", folders / "dense").divergence
    spilled = []
    made = HiddenStates.__init__

    def watched(self, count, *, spill_to, **options):
        spilled.extend([spill_to] * bool(count))  # a new stream has no batches yet
        made(self, count, spill_to=spill_to, **options)

    monkeypatch.setattr(HiddenStates, "__init__", watched)
    monkeypatch.setattr(StreamedModel, "_place_states", lambda *_: StatesPlace(tmp_path, True))
    with Reference(folders / "dense") as reference:
        found = [score(folders, "pruned", reference).divergence for _ in range(2)]
    assert found == [expected] * 2
    assert spilled == [tmp_path]
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_several_texts_are_kept_where_that_is_wanted(folders, runs):
    texts = ("ids", "other") * 2
    with Reference(folders / "dense", texts=2) as reference:
        found = [score(folders, "pruned", reference, text) for text in texts]
        assert runs == ["dense", "dense"]
        score(folders, "pruned", reference, samples=4)
        score(folders, "pruned", reference)
    assert runs == ["dense"] * 4, "the text before the last two is dropped"
    alone = [score(folders, "pruned", folders / "dense", text) for text in texts]
    assert [*map(without_seconds, found)] == [*map(without_seconds, alone)]


@pytest.mark.parametrize("kind", ["packed", "loaded", "not by blocks"])
def test_what_has_no_blocks_to_keep_is_loaded_once_and_runs_again(kind, folders, monkeypatch, runs):
    name = "packed" if kind == "packed" else "dense"
    expected = side_by_side(folders, "pruned", token_ids(5, 24))
    loaded = []
    load = ComputeOptions.load
    monkeypatch.setattr(
        ComputeOptions, "load", lambda self, one: loaded.append(one) or load(self, one)
    )
    if kind == "not by blocks":

        def refuse(*_):
            raise NotImplementedError

        monkeypatch.setattr(StreamedModel, "__init__", refuse)
    model = load_model(folders / name) if kind == "loaded" else folders / name
    with Reference(model) as reference:
        found = [score(folders, "pruned", reference).divergence for _ in range(2)]
    assert found[0] == found[1]
    if kind == "packed":
        assert found[0].kl < 1e-2, "packed kernels may add in another order"
    else:
        without = {"reference": "", "kl_max_at": None}
        assert dataclasses.replace(found[0], **without) == dataclasses.replace(expected, **without)
    assert loaded.count(folders / name) == (kind != "loaded")
    assert runs == []


@pytest.mark.parametrize("stream", [False, True])
def test_eval_scores_all_models_and_the_reference_side_by_side(stream, folders, tmp_path, runs):
    texts = [folders / "ids.safetensors", folders / "other.safetensors"]
    json_file = tmp_path / "eval.json"
    call(
        "eval",
        *(folders / model for model in (MODELS[:2] if stream else MODELS)),
        *("--reference", folders / "dense"),
        *("--perplexity", ",".join(map(str, texts)), "--seqlen", 24, "--batch", 2),
        *("--device", "cpu", "--json", json_file, "--stream" if stream else "--no-stream"),
    )
    # The reference comes first, and once for each text: `dense` is a model as well.
    assert runs == (["dense", "dense", "pruned"] * 2 if stream else [])
    for model in json.loads(json_file.read_text())["models"]:
        *of_texts, joined = model["perplexity"]
        assert joined["source"] == "all texts"
        for text, found in zip(("ids", "other"), of_texts, strict=True):
            name = model["model"].rpartition("/")[2]
            alone = score(folders, name, folders / "dense", text, stream=stream)
            expected = alone.as_dict() | {"seconds": 0}
            assert found | {"seconds": 0} == json.loads(json.dumps(expected))
