"""Models side by side, and differences with their standard errors."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prunus
from changes import edit_tensors
from command_line import call
from prunus.evaluation.eval_records import PAPER7, task_metrics
from prunus.evaluation.model_input import ModelInput
from recovery_cases import training_text
from tiny import token_ids
from tiny_tokenizer import dense_checkpoint
from zeroshot_rows import LOCAL, write_local_datasets

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and its dependencies' own


@pytest.fixture(scope="module")
def local_datasets(tmp_path_factory) -> Path:
    return write_local_datasets(tmp_path_factory.mktemp("data"), count=9)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Two models of the same shape, with tokenizers; no test writes to them."""
    root = tmp_path_factory.mktemp("models")
    first = dense_checkpoint(root / "first", max_position_embeddings=1024)
    second = Path(shutil.copytree(first, root / "second"))
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(second, lambda tensors: tensors[name][0, 0].add_(3))
    return {"first": first, "second": second}


@needs_lm_eval
def test_compressed_models_are_evaluated(models, local_datasets, tmp_path):
    prunus.compress(models["first"], tmp_path / "small", 8, calibration=token_ids())
    options = {"data": local_datasets, "include_path": LOCAL, "dtype": "float32"}
    small, dense = (
        prunus.evaluate(model, "rte,arc_easy", **options)
        for model in (tmp_path / "small", models["first"])
    )
    # With 8 bits a likelihood differs little, an answer hardly ever.
    for key, metric in task_metrics(small).items():
        assert metric.value == pytest.approx(task_metrics(dense)[key].value, abs=0.25)


@needs_lm_eval
def test_eval_puts_models_side_by_side(models, local_datasets, tmp_path):
    text, report = training_text(tmp_path), tmp_path / "report.json"
    first, second = map(str, models.values())
    scores = ("--tasks", "paper7", "--perplexity", text, "--seqlen", 32)
    options = ("--data", local_datasets, "--limit", 4, "--samples", 4, "--json", report)
    result = call("eval", first, second, *scores, *options, "--include-path", LOCAL)
    written = json.loads(report.read_text())
    assert [entry["model"] for entry in written["models"]] == [first, second]
    for entry in written["models"]:
        assert entry["perplexity"][0]["windows"] == 4
        assert entry["tasks"]["task_hashes"].keys() == set(PAPER7)
        assert f"{entry['perplexity'][0]['perplexity']:.3f}" in result.stdout
        assert f"{entry['tasks']['results']['paper7']['acc,none']:.2%} ±" in result.stdout
    changes = {(change["task"], change["metric"]): change for change in written["differences"]}
    assert ("hellaswag", "acc_norm") in changes
    before, after = (entry["tasks"]["results"]["paper7"] for entry in written["models"])
    mean = changes["paper7", "acc"]
    assert mean["value"] == pytest.approx(after["acc,none"] - before["acc,none"])
    assert mean["paired"]
    # lm-eval's own file is read as well.
    report.write_text(json.dumps(written["models"][1]["tasks"]))
    assert f"{after['acc,none']:.2%} ±" in call("report", report).stdout


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["{first}", "--tasks", "rte", "--batch", "few"], "batch must be 'auto' or at least 1"),
        (["{first}", "--tasks", "rte", "--limit", "0"], "limit must be at least 1"),
    ],
)
def test_eval_refuses_before_any_work(arguments, complaint, models, local_datasets, monkeypatch):
    monkeypatch.setattr(ModelInput, "load_model", None)
    filled = [argument.format(first=models["first"]) for argument in arguments]
    result = call("eval", *filled, "--data", local_datasets, status=2)
    assert complaint in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# --- differences ---


def results(**tasks: list[float] | tuple[float, float | None]) -> dict:
    """Made-up results: outcomes of single rows, or a value with its error."""
    values, samples = {}, {}
    for task, given_ in tasks.items():
        if isinstance(given_, list):
            samples[task] = [{"filter": "none", "acc": x} for x in given_]
            given_ = (float(np.mean(given_)), None)
        values[task] = {"acc,none": given_[0], "acc_stderr,none": given_[1]}
    hashes = {task: f"definition of {task}" for task in tasks}
    return {"results": values, "samples": samples, "task_hashes": hashes}


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_differences_are_taken_row_by_row(pairs):
    a, b = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    [change] = prunus.compare({"a": results(x=a), "b": results(x=b)})
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
    [change] = prunus.compare({"a": results(x=a), "b": results(x=b)})
    assert change.significant
    alone = [(float(np.mean(x)), float(np.std(x, ddof=1) / 10)) for x in (a, b)]
    [unpaired] = prunus.compare({"a": results(x=alone[0]), "b": results(x=alone[1])})
    assert not unpaired.paired
    assert not unpaired.significant
    assert unpaired.stderr == pytest.approx((alone[0][1] ** 2 + alone[1][1] ** 2) ** 0.5)


def test_models_that_do_not_differ_and_that_cannot_be_compared():
    same = results(x=[1.0, 0.0, 1.0])
    [change] = prunus.compare({"a": same, "b": same})
    assert not change.significant
    [change] = prunus.compare({"a": results(x=(0.1, None)), "b": results(x=(0.9, None))})
    assert (change.stderr, change.significant) == (None, False)
    assert prunus.compare({"a": same}) == prunus.compare({}) == []
    other = same | {"task_hashes": {"x": "other"}}
    with pytest.raises(ValueError, match="x was not the same for a and b"):
        prunus.compare({"a": same, "b": other})


def test_the_papers_mean_is_compared_by_its_tasks():
    rng = np.random.default_rng(0)
    rows = [
        {task: rng.integers(0, 2, 30).astype(float).tolist() for task in PAPER7} for _ in range(2)
    ]
    means = [float(np.mean([np.mean(x) for x in one.values()])) for one in rows]
    found = {
        name: results(**one, paper7=(mean, 0.1))
        for name, one, mean in zip("ab", rows, means, strict=True)
    }
    changes = {change.task: change for change in prunus.compare(found)}
    mean = changes.pop("paper7")
    assert mean.value == pytest.approx(means[1] - means[0])
    errors = [change.stderr for change in changes.values()]
    assert mean.stderr == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 7)
