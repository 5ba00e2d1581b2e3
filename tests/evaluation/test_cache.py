"""The cache of results, models side by side, and differences with their standard errors."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import prunus
from packed_reference import pruned_checkpoint
from prunus import pack, unpack
from prunus.cli import app
from prunus.evaluation import (
    PAPER7,
    Metric,
    TaskResults,
    TaskScore,
    default_cache_folder,
    perplexity,
    task_runner,
)
from prunus.evaluation.cache import ResultCache, checkpoint_digest
from tiny import tiny_checkpoint
from tiny_tokenizer import VOCABULARY, byte_tokenizer
from zeroshot_rows import write_local_datasets

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and its dependencies' own


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch):
    monkeypatch.delenv("PRUNUS_DATA", raising=False)


@pytest.fixture(scope="module")
def local_datasets(tmp_path_factory) -> Path:
    return write_local_datasets(tmp_path_factory.mktemp("data"), count=9)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Two models of the same shape, with tokenizers; no test writes to them."""
    root = tmp_path_factory.mktemp("models")
    first = tiny_checkpoint(root / "first", vocab_size=VOCABULARY, max_position_embeddings=1024)
    byte_tokenizer().save_pretrained(first)
    second = Path(shutil.copytree(first, root / "second"))
    alter(second)
    return {"first": first, "second": second}


def alter(folder: Path) -> None:
    """Change one weight of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The names of the folders that were loaded."""
    seen: list[str] = []
    load = task_runner.load_model

    def counted(folder, *rest):
        seen.append(folder.name)
        return load(folder, *rest)

    monkeypatch.setattr(task_runner, "load_model", counted)
    return seen


# --- the cache itself ---


def test_results_are_found_by_everything_in_the_key(tmp_path):
    cache = ResultCache(tmp_path / "new")
    key = {"checkpoint": "abc", "limit": None, "versions": {"torch": "2"}}
    assert cache.get(key) is None
    assert cache.put(key, {"value": 0.1 + 0.2}) is None
    assert cache.get(dict(reversed(key.items()))) == {"value": 0.1 + 0.2}
    for changed in ({"checkpoint": "abd"}, {"limit": 1}, {"versions": {"torch": "3"}}, {"more": 1}):
        assert cache.get(key | changed) is None
    [entry] = (tmp_path / "new").rglob("*.json")
    for damaged in ("", "[]", "{}", json.dumps({"key": {"other": 1}, "result": {}}), '{"key": '):
        entry.write_text(damaged)
        assert cache.get(key) is None
    assert cache.put(key, {"value": 1}) is None
    assert cache.get(key) == {"value": 1}
    (tmp_path / "file").touch()
    assert "could not be written to the cache" in (
        ResultCache(tmp_path / "file").put(key, {}) or ""
    )


def test_where_results_are_cached(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    assert default_cache_folder() == tmp_path
    monkeypatch.delenv("PRUNUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "prunus" / "results"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "prunus" / "results"


def test_the_digest_is_of_the_content(models, tmp_path):
    copy = Path(shutil.copytree(models["first"], tmp_path / "copy"))
    digest = checkpoint_digest(models["first"])
    assert checkpoint_digest(copy) == digest != checkpoint_digest(models["second"])
    for name in ("prunus.json", "README.md"):
        (copy / name).write_text("{}")
    os.utime(copy / "model.safetensors", (1, 1))
    (copy / "modeling.py").touch()
    assert checkpoint_digest(copy) == digest
    assert checkpoint_digest(copy, code=True) != digest
    for name in ("config.json", "tokenizer.json"):
        before = (copy / name).read_text()
        (copy / name).write_text(before + " ")
        assert checkpoint_digest(copy) != digest
        (copy / name).write_text(before)


def test_an_adapter_counts_with_its_base(models, tmp_path):
    base = Path(shutil.copytree(models["first"], tmp_path / "base"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    save_file({"a": torch.ones(2)}, adapter / "adapter_model.safetensors")
    before = checkpoint_digest(adapter)
    alter(base)
    changed = checkpoint_digest(adapter)
    save_file({"a": torch.zeros(2)}, adapter / "adapter_model.safetensors")
    assert len({before, changed, checkpoint_digest(adapter)}) == 3


def test_perplexity_is_computed_once(models, tmp_path, monkeypatch):
    text, cache = tmp_path / "text.txt", tmp_path / "cache"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 12)
    options = {"seqlen": 32, "cache": cache}
    found = perplexity(models["first"], str(text), **options)
    assert found == replace(
        perplexity(models["first"], str(text), seqlen=32), seconds=found.seconds
    )

    def load(*_):
        raise AssertionError("loaded")

    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["prunus.evaluation.perplexity"], "load_model", load)
    assert perplexity(models["first"], str(text), **options) == found
    others = (
        {"limit": 2},
        {"batch": 2},
        {"dtype": "bfloat16"},
        {"seqlen": 16},
        {"cache": tmp_path / "b"},
    )
    for other in others:
        with pytest.raises(AssertionError, match="loaded"):
            perplexity(models["first"], str(text), **options | other)
    with pytest.raises(AssertionError, match="loaded"):
        perplexity(models["second"], str(text), **options)
    text.write_text(text.read_text().replace("fox", "cat"))
    with pytest.raises(AssertionError, match="loaded"):
        perplexity(models["first"], str(text), **options)


# --- tasks ---


@needs_lm_eval
def test_a_model_is_evaluated_once(models, local_datasets, tmp_path, loads):
    cache = tmp_path / "cache"
    options = {"data_dir": local_datasets, "cache": cache, "limit": 4}
    fresh = prunus.evaluate(models["first"], "rte,arc_easy", **options)
    assert loads == ["first"]
    again = prunus.evaluate(models["first"], "arc_easy,rte,boolq", **options)
    assert [(score.task, score.cached) for score in again.scores] == [
        ("arc_easy", True),
        ("rte", True),
        ("boolq", False),
    ]
    known = {score.task: replace(score, cached=False) for score in again.scores}
    assert [known[score.task] for score in fresh.scores] == list(fresh.scores)
    assert prunus.evaluate(models["first"], "rte,boolq", **options).metrics().keys() == {
        ("rte", "acc"),
        ("boolq", "acc"),
    }
    assert loads == ["first", "first"], "the third call needed no model"
    copy = Path(shutil.copytree(models["first"], tmp_path / "copy"))
    prunus.evaluate(copy, "rte", **options)
    assert loads[2:] == [], "the same bytes in another folder"
    for other in ({"limit": 5}, {"batch": 2}, {"dtype": "bfloat16"}, {"cache": None}):
        prunus.evaluate(models["first"], "rte", **options | other)
    prunus.evaluate(models["second"], "rte", **options)
    assert loads[2:] == ["first"] * 4 + ["second"]


@needs_lm_eval
def test_a_cache_that_cannot_be_written_costs_nothing(models, local_datasets, tmp_path):
    (tmp_path / "file").touch()
    said: list[str] = []
    options = {"data_dir": local_datasets, "limit": 2, "progress": said.append}
    found = prunus.evaluate(models["first"], "rte", cache=tmp_path / "file", **options)
    assert found.metrics() == prunus.evaluate(models["first"], "rte", **options).metrics()
    assert any("could not be written to the cache" in line for line in said)


@needs_lm_eval
def test_packed_models_and_adapters_are_evaluated(models, local_datasets, tmp_path):
    source = pruned_checkpoint(
        tmp_path / "pruned", vocab_size=VOCABULARY, max_position_embeddings=1024, hidden_size=64
    )
    byte_tokenizer().save_pretrained(source)
    pack(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "plain")
    options = {"data_dir": local_datasets, "dtype": "bfloat16"}
    packed, plain = (
        prunus.evaluate(tmp_path / name, "rte,arc_easy", **options) for name in ("packed", "plain")
    )
    # Kernels add in another order: a likelihood may differ in its last bits, an answer hardly ever.
    for key, metric in packed.metrics().items():
        assert metric.value == pytest.approx(plain.metrics()[key].value, abs=0.25)
    peft = pytest.importorskip("peft", reason="adapters need the extra adapters")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=True
    )
    adapted = peft.get_peft_model(task_runner.load_model(models["first"]), config)
    adapted.save_pretrained(tmp_path / "adapter")
    options = {"data_dir": local_datasets, "cache": tmp_path / "cache"}
    found = prunus.evaluate(tmp_path / "adapter", "rte,arc_easy", **options)
    # A fresh LoRA changes nothing.
    assert found.metrics() == prunus.evaluate(models["first"], "rte,arc_easy", **options).metrics()


@needs_lm_eval
def test_eval_puts_models_side_by_side(models, local_datasets, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    text, report = tmp_path / "text.txt", tmp_path / "report.json"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 12)
    first, second = map(str, models.values())
    options = ["--data", str(local_datasets), "--limit", "4", "--json", str(report)]
    arguments = [
        "eval",
        first,
        second,
        "--tasks",
        "paper7",
        "--perplexity",
        str(text),
        "--seqlen",
        "32",
    ]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    assert [entry["model"] for entry in written["models"]] == [first, second]
    for entry in written["models"]:
        assert entry["perplexity"][0]["windows"] == 4
        assert [task["task"] for task in entry["tasks"]["tasks"]] == list(PAPER7)
        assert f"{entry['perplexity'][0]['perplexity']:.3f}" in result.stdout
        assert f"{100 * entry['tasks']['paper7_mean_acc']['value']:.2f} ±" in result.stdout
    changes = {(change["task"], change["metric"]): change for change in written["differences"]}
    assert ("hellaswag", "acc_norm") in changes
    before, after = (entry["tasks"]["paper7_mean_acc"]["value"] for entry in written["models"])
    assert changes["mean of paper7", "acc"]["value"] == pytest.approx(after - before)
    assert "second − first" in " ".join(result.stdout.split())
    again = CliRunner().invoke(app, ["eval", first, "--tasks", "rte", *options])
    assert "rte found in the cache" in again.stderr
    assert "1 tasks computed earlier" in " ".join(again.stdout.split())
    anew = CliRunner().invoke(app, ["eval", first, "--tasks", "rte", "--no-cache", *options])
    assert "rte done in" in anew.stderr


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["{first}", "{first}x", "--tasks", "rte"], "neither a folder nor a hub id"),
        (["{first}", "--tasks", "rte", "--batch", "few"], "batch must be auto or a number"),
        (["{first}", "--tasks", "rte", "--fewshot", "2"], "lacks zeroshot/rte_train.jsonl"),
        (["{first}", "--tasks", "rte", "--perplexity", "wikitext3"], "unknown text 'wikitext3'"),
    ],
)
def test_eval_refuses_before_any_work(
    arguments, complaint, models, local_datasets, loads, tmp_path
):
    filled = [argument.format(first=models["first"]) for argument in arguments]
    result = CliRunner().invoke(
        app, ["eval", *filled, "--data", str(local_datasets), "--cache", str(tmp_path / "c")]
    )
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not loads
    assert not (tmp_path / "c").exists()


# --- differences ---


def results(model: str, **tasks: list[float] | tuple[float, float | None]) -> TaskResults:
    """Made-up results: outcomes of single rows, or a value with its error."""
    scores = []
    for task, given_ in tasks.items():
        if isinstance(given_, list):
            spread = float(np.std(given_, ddof=1) / len(given_) ** 0.5) if len(given_) > 1 else None
            metric = Metric(float(np.mean(given_)), spread, tuple(given_))
        else:
            metric = Metric(*given_)
        scores.append(TaskScore(task, {"acc": metric}, 0, 4, "1", f"definition of {task}", "", 1.0))
    return TaskResults(model, tuple(scores), {})


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_differences_are_taken_row_by_row(pairs):
    a, b = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    [change] = prunus.compare([results("a", x=a), results("b", x=b)])
    steps = np.subtract(b, a)
    assert change.paired
    assert change.value == pytest.approx(steps.mean(), abs=1e-12)
    assert change.stderr == pytest.approx(steps.std(ddof=1) / len(steps) ** 0.5)
    assert change.significant == (abs(change.value) > 2 * change.stderr)


def test_pairing_sees_what_independent_errors_hide():
    a = [1.0, 0.0] * 50
    b = list(a)
    for row in range(0, 12, 2):
        b[row] = 0.0  # six of a hundred rows are lost and none won
    [change] = prunus.compare([results("a", x=a), results("b", x=b)])
    assert change.significant
    alone = [(float(np.mean(x)), float(np.std(x, ddof=1) / 10)) for x in (a, b)]
    [unpaired] = prunus.compare([results("a", x=alone[0]), results("b", x=alone[1])])
    assert not unpaired.paired
    assert not unpaired.significant
    assert unpaired.stderr == pytest.approx((alone[0][1] ** 2 + alone[1][1] ** 2) ** 0.5)


def test_equal_models_and_unknown_errors_do_not_differ():
    same = results("a", x=[1.0, 0.0, 1.0])
    assert [change.significant for change in prunus.compare([same, replace(same, model="b")])] == [
        False
    ]
    [change] = prunus.compare([results("a", x=(0.1, None)), results("b", x=(0.9, None))])
    assert (change.stderr, change.significant) == (None, False)
    assert prunus.compare([same]) == []
    assert prunus.compare([]) == []


def test_the_papers_mean_is_compared_by_its_tasks():
    rng = np.random.default_rng(0)
    rows = [
        {task: rng.integers(0, 2, 30).astype(float).tolist() for task in PAPER7} for _ in range(2)
    ]
    changes = {
        change.task: change
        for change in prunus.compare([results("a", **rows[0]), results("b", **rows[1])])
    }
    mean = changes.pop("mean of paper7")
    assert mean.value == pytest.approx(np.mean([change.value for change in changes.values()]))
    errors = [change.stderr for change in changes.values()]
    assert mean.stderr == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 7)
    # The paper's own row for dense LLaMA-7B, and the mean that it prints.
    table = dict(zip(PAPER7, (0.7505, 0.6643, 0.5692, 0.6993, 0.7534, 0.4189, 0.3440), strict=True))
    dense = results("llama", **{task: (value, 0.01) for task, value in table.items()})
    assert round(100 * dense.metrics()["mean of paper7", "acc"].value, 2) == 59.99


def test_different_rows_are_not_compared():
    first = results("a", x=[1.0, 0.0])
    other = replace(first, model="b", scores=(replace(first.scores[0], definition="other"),))
    with pytest.raises(ValueError, match="x was not the same for a and b"):
        prunus.compare([first, other])


def test_what_other_users_can_write_is_not_believed(tmp_path):
    cache, key = ResultCache(tmp_path / "cache"), {"task": "rte"}
    assert cache.put(key, {"acc": 0.5}) is None
    [entry] = cache.folder.rglob("*.json")
    for place in (entry, entry.parent, cache.folder):
        mode = place.stat().st_mode
        for writable in (0o020, 0o002):
            place.chmod(mode | writable)
            assert cache.get(key) is None
        if place != entry:
            assert "other users can write the cache" in (cache.put(key, {"acc": 1.0}) or "")
        place.chmod(mode)
        assert cache.get(key) == {"acc": 0.5}


@pytest.mark.parametrize("content", ["{}", "[" * 100_000, '{"loss": "x"}', '{"loss": 1e999}'])
def test_a_damaged_entry_is_as_good_as_none(content, models, tmp_path):
    ids = torch.arange(64).reshape(2, 32)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")

    def score():
        return perplexity(
            models["first"], str(tmp_path / "ids.safetensors"), seqlen=32, cache=tmp_path / "cache"
        ).loss

    first = score()
    [entry] = (tmp_path / "cache").rglob("*.json")
    stored = json.loads(entry.read_text())
    entry.write_text(
        content
        if content.startswith("[")
        else f'{{"key": {json.dumps(stored["key"])}, "result": {content}}}'
    )
    assert score() == first
    assert json.loads(entry.read_text())["result"] == pytest.approx(
        stored["result"] | {"seconds": json.loads(entry.read_text())["result"]["seconds"]}
    )
