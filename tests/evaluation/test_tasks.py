"""Tasks are lm-eval's own: prompts, scores and the file of results; local rows come by YAML."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

import prunus
from prunus.evaluation.eval_records import PAPER7, task_metrics
from refusals import assert_refused
from tiny import tiny_model
from tiny_tokenizer import BOS, EOS, VOCABULARY, byte_tokenizer
from zeroshot_rows import LOCAL, SPLIT, TASKS, reduced, upstream, write_local_datasets, write_split

lm_eval = pytest.importorskip("lm_eval", reason="tasks need the extra eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and its dependencies' own


@pytest.fixture(scope="module")
def local_datasets(tmp_path_factory) -> Path:
    return write_local_datasets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model():
    return tiny_model(
        vocab_size=VOCABULARY, max_position_embeddings=1024, bos_token_id=BOS, eos_token_id=EOS
    )


def evaluate(model, tasks, data, **options):
    given = {"tokenizer": byte_tokenizer(), "data": data, "include_path": LOCAL} | options
    return prunus.evaluate(model, tasks, **given)


def test_local_tasks_have_lm_evals_own_prompts_and_scoring():
    """Only where the rows come from may differ."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(lm_eval.tasks.__file__).parent
    homes = [f"{name}*" for name in ("super_glue/boolq", "glue/rte", *TASKS, "arc", "lambada")]
    own = TaskManager(include_defaults=False, include_path=[f for h in homes for f in root.glob(h)])
    rows = ("custom_dataset", "dataset_kwargs", "dataset_path", "dataset_name")
    unused = ("tag", "test_split", "should_decontaminate", "doc_to_decontamination_query")
    for name in TASKS:
        here, there = load_yaml(LOCAL / f"{name}.yaml"), load_yaml(own.task_index[name].yaml_path)
        assert here.get("test_split") == there.get("test_split")
        for each in (here, there):
            for key in (*rows, *unused):
                each.pop(key, None)
            each |= {key: x.__name__ for key, x in each.items() if callable(x)}
        assert here == there


def test_local_rows_in_the_short_form_give_the_prompts_of_those_of_the_hub(model, tmp_path):
    asked: dict[str, list] = {name: [] for name in TASKS}
    for form in (lambda name, row: row, reduced):
        for name in TASKS:
            rows = [form(name, row) for row in upstream(name)]
            write_split(tmp_path, name, SPLIT[name], rows)
        for name, samples in evaluate(model, ",".join(TASKS), tmp_path)["samples"].items():
            asked[name].append([(row["arguments"], str(row["target"])) for row in samples])
    for name, (hub, local) in asked.items():
        assert hub == local and len(hub) == 6, name


@pytest.mark.parametrize("rows", ["local_datasets", pytest.param("data", marks=pytest.mark.slow)])
def test_the_paper_mean_and_the_file_of_lm_eval_also_of_real_rows(rows, model, request):
    data = request.getfixturevalue(rows)
    found = evaluate(model, "paper7,lambada_openai", data, limit=3)
    samples = found.pop("samples")
    assert list(samples) == [*PAPER7, "lambada_openai"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["task_hashes"].keys() == samples.keys()
    assert found["versions"]["boolq"] == 2.0
    metrics = task_metrics(found)
    every = [metrics[task, "acc"] for task in PAPER7]
    mean = metrics["paper7", "acc"]
    assert mean.value == pytest.approx(sum(x.value for x in every) / 7)
    assert mean.stderr == pytest.approx(math.hypot(*(x.stderr for x in every)) / 7)
    assert task_metrics(found | {"samples": samples})["boolq", "acc"].outcomes is not None
    assert task_metrics(evaluate(model, "rte", data, limit=1))["rte", "acc"].stderr is None


def test_accuracy_is_that_of_a_slow_reference(model, tmp_path):
    """acc takes the choice whose tokens are likeliest, acc_norm the likeliest per byte."""
    write_split(tmp_path, "arc_easy", "test", upstream("arc_easy", 14))
    found = evaluate(model, "arc_easy", tmp_path, batch=3)
    tokenizer = byte_tokenizer()
    expected: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for row in found["samples"]["arc_easy"]:
        likelihoods = []
        for context, continuation in row["arguments"]:
            before = len(tokenizer(context)["input_ids"])
            ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
            with torch.no_grad():
                logits = model(ids).logits[0].log_softmax(-1)
            chosen = logits[before - 1 : -1].gather(1, ids[0, before:, None])
            likelihoods.append((chosen.sum().item(), len(continuation.removeprefix(" ").encode())))
        for key, values in (
            ("acc", [x for x, _ in likelihoods]),
            ("acc_norm", [x / length for x, length in likelihoods]),
        ):
            expected[key].append(float(values.index(max(values)) == int(row["target"])))
    metrics = task_metrics(found)
    assert {key: list(metrics["arc_easy", key].outcomes) for key in expected} == expected


def test_few_shot_numbers_are_reported(model, tmp_path):
    for split, first in (("test", 0), ("train", 20)):
        write_split(tmp_path, "arc_easy", split, upstream("arc_easy", 6, first))
    found = evaluate(model, " arc_easy, ", tmp_path, fewshot=2)
    assert found["n-shot"]["arc_easy"] == 2
    assert found["samples"]["arc_easy"][0]["arguments"][0][0].count("Question") == 3


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"fewshot": -1}, "fewshot must be at least 0"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"batch": 0}, "batch must be 'auto' or at least 1"),
        ({"batch": "many"}, "batch must be 'auto' or at least 1"),
        ({"dtype": "int8"}, "dtype: input should be"),
        ({"dtype": "float32"}, "a loaded model is scored as it is"),
        ({"tokenizer": None}, "needs its tokenizer"),
        ({"tasks": ","}, "no tasks are named"),
        ({"tasks": "boolq,arc_eazy"}, r"unknown task 'arc_eazy': .*; did you mean arc_easy"),
        ({"include_path": Path("none")}, "include_path none is not a folder"),
        ({"data": Path("none")}, "data folder does not exist"),
        ({"data": None}, "give the folder of the rows in PRUNUS_DATA"),
        ({"data": LOCAL}, r"zeroshot/rte_validation.jsonl does not exist"),
    ],
)
def test_what_is_refused_before_any_work(options, complaint, model, local_datasets, monkeypatch):
    from lm_eval.tasks import TaskManager

    # lm-eval's whole catalogue takes many seconds to read.
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager",
        lambda **given: TaskManager(**given | {"include_defaults": False}),
    )
    monkeypatch.setattr("lm_eval.simple_evaluate", None)
    given = {"tasks": "rte", "data": local_datasets} | options
    assert_refused((ValueError, OSError), complaint, evaluate, model, **given)


def test_several_processes_are_lm_evals_own(model, local_datasets, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "h", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert_refused(ValueError, "accelerate launch", evaluate, model, "rte", local_datasets)


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_read(local_datasets, tmp_path):
    narrow = tiny_model(vocab_size=100, max_position_embeddings=1024)
    with pytest.raises(ValueError, match="its tokenizer has 258 tokens, the model a vocabulary"):
        evaluate(narrow, "rte", local_datasets)
    narrow.config.save_pretrained(tmp_path)  # no weights: they would be missed if they were read
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer does not fit"):
        evaluate(tmp_path, "rte", local_datasets, tokenizer=None)


def test_outputs_that_are_no_numbers_are_refused(model, local_datasets):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e38)
        model.lm_head.weight.mul_(1e5)
    with pytest.raises(ValueError, match=r"rte, row 0: the model's outputs are not finite"):
        evaluate(model, "rte", local_datasets)


def test_without_the_extra_its_name_is_given(model, local_datasets, uninstalled):
    uninstalled("lm_eval")
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[eval\]'"):
        evaluate(model, "rte", local_datasets)
