"""Tasks: local datasets change only where rows come from, and accuracy equals a slow reference."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch

import prunus
from prunus.calibration.files import read_text
from prunus.evaluation import tasks
from prunus.evaluation.eval_records import PAPER7
from prunus.evaluation.tasks import load_tasks
from refusals import assert_refused
from tiny import tiny_model
from tiny_tokenizer import BOS, EOS, VOCABULARY, byte_tokenizer
from zeroshot_rows import SPLIT, TASKS, reduced, upstream, write_local_datasets, write_split

lm_eval = pytest.importorskip("lm_eval", reason="tasks need the extra eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and its dependencies' own

CHOICES = ("arc_easy", "arc_challenge", "openbookqa")


@pytest.fixture(scope="module")
def local_datasets(tmp_path_factory) -> Path:
    return write_local_datasets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model():
    return tiny_model(
        vocab_size=VOCABULARY, max_position_embeddings=1024, bos_token_id=BOS, eos_token_id=EOS
    )


def requests(task, shots: int = 0, limit: int | None = None) -> list[tuple]:
    """Everything that a task would ask a model, with the right answers."""
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=tasks.SEED)
    task.build_all_requests(limit=limit)
    return [(one.args, one.idx, task.doc_to_target(one.doc)) for one in task.instances]


def ours(
    name: str, folder: Path, shots: int | None = None, limit: int | None = None
) -> list[tuple]:
    [loaded] = load_tasks([name], shots, limit, folder)
    [task] = loaded.content["tasks"].values()
    return requests(task, shots or 0, limit)


def theirs(name: str, splits: dict[str, list[dict]], monkeypatch, shots: int = 0) -> list[tuple]:
    """lm-eval's own task on rows as the hub has them, labels as the hub types them."""
    import datasets
    from lm_eval.tasks import TaskManager

    def load_dataset(path, name=None, **_):
        found = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        if "glue" in path:  # super_glue and glue have classes, not numbers
            names = ["False", "True"] if name == "boolq" else ["entailment", "not_entailment"]
            kind = datasets.ClassLabel(names=names)
            found = {split: rows.cast_column("label", kind) for split, rows in found.items()}
        return datasets.DatasetDict(found)

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        root = Path(lm_eval.tasks.__file__).parent
        manager = TaskManager(
            include_defaults=False, include_path=[root / home for home in tasks._LOCAL_TASK_FOLDERS]
        )
        return requests(manager.load([name])["tasks"][name], shots)


# --- local datasets ---


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_targets_are_those_of_lm_evals_own_task(name, tmp_path, monkeypatch):
    rows, examples = upstream(name), upstream(name, 9, first=20)
    # Where there is no training split, lm-eval draws from the rows themselves.
    splits = (
        {SPLIT[name]: rows} if name == "lambada_openai" else {SPLIT[name]: rows, "train": examples}
    )
    if SPLIT[name] == "test" and name != "lambada_openai":
        splits["validation"] = upstream(name, 5, first=40)
    for split, content in splits.items():
        write_split(tmp_path, name, split, [reduced(name, row) for row in content])
    for shots in (0, 3):
        expected = theirs(name, splits, monkeypatch, shots)
        assert ours(name, tmp_path, shots) == expected
        assert len(expected) >= len(rows)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "lambada_openai"])
def test_real_rows_give_the_prompts_of_lm_evals_own_task(name, data, tmp_path, monkeypatch):
    stem = "winogrande_xl" if name == "winogrande" else name
    [file] = (data / "zeroshot").glob(f"{stem}_validation.jsonl*")
    rows = [json.loads(line) for line in read_text(file).split("\n") if line]
    # lm-eval takes its time: the first rows, some others, and all whose choices are not A to D.
    rare = [row for row in rows[20:] if name in CHOICES and len(row["choices"]["label"]) != 4]
    rows = rows[:20] + rows[20 :: len(rows) // 20] + rare
    expected = theirs(name, {"test": rows, "validation": rows, "train": rows[:1]}, monkeypatch)
    write_split(tmp_path, name, SPLIT[name], rows)
    assert ours(name, tmp_path) == expected
    if name in CHOICES:
        write_split(tmp_path, name, "test", [reduced(name, row) for row in rows])
        assert ours(name, tmp_path) == expected


def test_examples_come_from_the_training_split_and_from_no_other(tmp_path):
    write_split(
        tmp_path, "arc_easy", "test", [reduced("arc_easy", row) for row in upstream("arc_easy")]
    )
    write_split(tmp_path, "arc_easy", "validation", upstream("arc_easy", 9, first=50))
    with pytest.raises(FileNotFoundError, match=r"zeroshot/arc_easy_train.jsonl .*the examples"):
        load_tasks(["arc_easy"], 2, None, tmp_path)
    write_split(tmp_path, "arc_easy", "train", upstream("arc_easy", 9, first=20))
    years = [re.findall(r"in (\d+) years", args[0]) for args, _, _ in ours("arc_easy", tmp_path, 2)]
    assert all(len(found) == 3 and int(found[2]) < 6 for found in years)
    assert all(20 <= int(year) < 29 for found in years for year in found[:2])


def test_missing_files_are_refused_with_all_their_names(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"boolq_validation.jsonl.*openbookqa_test.jsonl"):
        load_tasks(["boolq", "openbookqa"], folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="data folder does not exist"):
        prunus.evaluate(model, "boolq", tokenizer=byte_tokenizer(), data=tmp_path / "none")


def test_damaged_rows_are_named(tmp_path):
    path = write_split(tmp_path, "arc_easy", "test", [reduced("arc_easy", upstream("arc_easy")[0])])
    first = path.read_text()
    for line, complaint in (
        ("{", "Expecting property name"),
        ("[]", "line 2: expected a JSON object"),
        (
            '{"id": "x", "question": "q", "choices": ["a"], "gold": 1}',
            "gold is 1, but there are 1 choices",
        ),
        ('{"id": "x", "choices": ["a"], "gold": 0}', "row 1 has no value for 'question'"),
        ('{"id": "x", "question": "q"}', "row 1 has no value for 'choices'"),
    ):
        path.write_text(first + line + "\n")
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{re.escape(complaint)}"):
            load_tasks(["arc_easy"], folder=tmp_path)
    for nothing in ("", "\n"):
        path.write_text(nothing)
        assert_refused(ValueError, re.escape(str(path)), load_tasks, ["arc_easy"], folder=tmp_path)
    write_split(tmp_path, "rte", "validation", [{"sentence1": "a", "label": 0}] * 2)
    assert_refused(ValueError, "sentence2", load_tasks, ["rte"], folder=tmp_path)


def test_short_catalogue_holds_the_definitions_of_the_long_one():
    """No other file of lm-eval defines a task of the local datasets, so a few files are enough."""
    root = Path(lm_eval.__file__).parent / "tasks"
    wanted = re.compile(rf"^task: ({'|'.join(TASKS)})\s*$", re.M)
    found = [
        (match, path.relative_to(root).as_posix())
        for path in root.rglob("*.yaml")
        for match in wanted.findall(path.read_text(encoding="utf-8"))
    ]
    assert sorted(match for match, _ in found) == sorted(TASKS)
    assert all(path.startswith(tasks._LOCAL_TASK_FOLDERS) for _, path in found)


# --- names ---


def test_names_of_tasks(model, local_datasets, monkeypatch):
    loaded = load_tasks(["rte", "paper7"], folder=local_datasets, limit=1)
    assert [task.name for task in loaded] == ["rte", *(task for task in PAPER7 if task != "rte")]
    options = {"tokenizer": byte_tokenizer(), "data": local_datasets, "limit": 1}
    assert [score.task for score in prunus.evaluate(model, " rte, ", **options).scores] == ["rte"]
    for nothing in (",", []):
        assert_refused(ValueError, "no tasks are named", prunus.evaluate, model, nothing, **options)
    # The whole catalogue takes many seconds to read.
    catalogue = tasks._catalogue(["rte"])
    monkeypatch.setattr(tasks, "_catalogue", lambda names: catalogue)
    with pytest.raises(ValueError, match=r"unknown task 'arc_eazy': .*; did you mean arc_easy"):
        load_tasks(["boolq", "arc_eazy"], folder=local_datasets)


def test_a_task_with_a_fixed_number_of_examples_keeps_it():
    class Config:
        task, num_fewshot = "fixed", 0

    class Task:
        config = Config()

    tasks._set_shots(Task(), None)
    assert_refused(
        ValueError, "fixed fixes its number of examples at 0", tasks._set_shots, Task(), 5
    )


def test_the_definition_changes_with_whatever_changes_the_prompts(local_datasets, tmp_path):
    def definition(folder=local_datasets, limit=None, shots=None):
        return load_tasks(["openbookqa"], shots, limit, folder)[0].definition

    assert definition() == definition()
    assert definition(limit=2) != definition()
    assert definition(limit=6) == definition(), "all rows are all rows"
    rows = [reduced("openbookqa", row) for row in upstream("openbookqa")]
    write_split(tmp_path, "openbookqa", "test", rows)
    assert definition(tmp_path) == definition(), "another folder, the same rows"
    write_split(tmp_path, "openbookqa", "train", upstream("openbookqa", 5, first=9))
    assert definition(tmp_path) == definition(), "examples count where they are used"
    assert definition(tmp_path, shots=1) != definition()
    rows[-1]["gold"] = 0
    write_split(tmp_path, "openbookqa", "test", rows)
    assert definition(tmp_path) != definition()


# --- scores ---


def reference_accuracy(model, tokenizer, asked: list[tuple], winogrande: bool = False):
    """acc and acc_norm from one plain forward pass per choice.

    acc takes the choice whose tokens have the largest likelihood, acc_norm the largest per byte.
    """
    rows: dict[int, list[tuple[float, float, int]]] = {}
    number = -1
    for (context, continuation), choice, target in asked:
        number += choice == 0
        before = tokenizer(context)["input_ids"]
        ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0].log_softmax(-1)
        chosen = logits[len(before) - 1 : -1].gather(1, ids[0, len(before) :, None])
        likelihood = chosen.sum().item()
        gold = {"1": 0, "2": 1}[target] if winogrande else int(target)
        length = len(continuation.removeprefix(" ").encode())
        rows.setdefault(number, []).append((likelihood, likelihood / length, gold))
    best = [
        [max(range(len(row)), key=lambda i: row[i][kind]) for row in rows.values()]
        for kind in (0, 1)
    ]
    gold = [row[0][2] for row in rows.values()]
    return [[float(a == b) for a, b in zip(picks, gold, strict=True)] for picks in best]


@pytest.mark.parametrize("name", ["rte", "hellaswag", "arc_easy", "openbookqa"])
def test_accuracy_is_that_of_a_slow_reference(name, model, tmp_path):
    rows = upstream(name, 14)
    write_split(tmp_path, name, SPLIT[name], [reduced(name, row) for row in rows])
    found = prunus.evaluate(model, name, tokenizer=byte_tokenizer(), data=tmp_path, batch=3)
    [score] = found.scores
    acc, acc_norm = reference_accuracy(model, byte_tokenizer(), ours(name, tmp_path))
    expected = {"acc": acc} if name == "rte" else {"acc": acc, "acc_norm": acc_norm}
    assert {key: list(metric.outcomes or ()) for key, metric in score.metrics.items()} == expected
    for key, outcomes in expected.items():
        mean = sum(outcomes) / 14
        assert score.metrics[key].value == pytest.approx(mean)
        variance = sum((x - mean) ** 2 for x in outcomes) / 13
        assert score.metrics[key].stderr == pytest.approx((variance / 14) ** 0.5)
    assert (score.task, score.rows, score.shots) == (name, 14, 0)


def test_the_paper_mean_and_limits(model, local_datasets):
    seen: list[str] = []
    options = {"tokenizer": byte_tokenizer(), "data": local_datasets, "progress": seen.append}
    found = prunus.evaluate(model, limit=3, **options)
    assert [score.task for score in found.scores] == list(PAPER7)
    assert {score.rows for score in found.scores} == {3}
    assert len(seen) == 7
    assert "boolq done in" in seen[0]
    values = [score.metrics["acc"].value for score in found.scores]
    described = found.as_dict()
    assert described["paper7_mean_acc"]["value"] == pytest.approx(sum(values) / 7)
    errors = [score.metrics["acc"].stderr for score in found.scores]
    assert described["paper7_mean_acc"]["stderr"] == pytest.approx(
        sum(e**2 for e in errors) ** 0.5 / 7
    )
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    single = prunus.evaluate(model, "rte", limit=1, **options)
    assert single.scores[0].metrics["acc"].stderr is None, "one row has no standard error"
    assert single.as_dict()["paper7_mean_acc"] is None
    [score] = prunus.evaluate(model, "lambada_openai", limit=2, **options).scores
    assert score.metrics["perplexity"].outcomes is None


def test_a_group_gives_its_own_scores_first(model, tmp_path):
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig
    from lm_eval.tasks import TaskManager

    metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group = Group.from_config(GroupConfig(group="pair", aggregate_metric_list=metrics))
    for name, count in (("rte", 8), ("openbookqa", 4)):
        write_split(tmp_path, name, SPLIT[name], upstream(name, count))
    for loaded in load_tasks(["rte", "openbookqa"], folder=tmp_path):
        group.add(*loaded.content["tasks"].values())
    content = TaskManager(include_defaults=False).load([group])
    pair = tasks.LoadedTask("pair", "definition", "the hub", None, content)
    scores = tasks.run_task(pair, tasks.wrap_model(model, byte_tokenizer(), 4))
    assert [score.task for score in scores] == ["pair", "rte", "openbookqa"]
    mean, rte, openbookqa = (score.metrics["acc"].value for score in scores)
    assert mean == pytest.approx((8 * rte + 4 * openbookqa) / 12)
    assert [score.rows for score in scores] == [12, 8, 4]


def test_few_shot_numbers_are_reported(model, tmp_path):
    for split, first in (("test", 0), ("train", 20)):
        write_split(tmp_path, "arc_easy", split, upstream("arc_easy", 6, first))
    options = {"tokenizer": byte_tokenizer(), "data": tmp_path}
    assert prunus.evaluate(model, "arc_easy", fewshot=2, **options).scores[0].shots == 2


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
    ],
)
def test_options_out_of_range(options, complaint, model, local_datasets):
    with pytest.raises(ValueError, match=complaint):
        prunus.evaluate(
            model, "rte", **{"tokenizer": byte_tokenizer(), "data": local_datasets, **options}
        )


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_read(local_datasets, tmp_path):
    narrow = tiny_model(vocab_size=100, max_position_embeddings=1024)
    with pytest.raises(ValueError, match="its tokenizer has 258 tokens, the model a vocabulary"):
        prunus.evaluate(narrow, "rte", tokenizer=byte_tokenizer(), data=local_datasets)
    narrow.config.save_pretrained(tmp_path)  # no weights: they would be missed if they were read
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer does not fit"):
        prunus.evaluate(tmp_path, "rte", data=local_datasets)


def test_token_ids_past_the_vocabulary_are_explained(model, local_datasets):
    """A special token that was added to the tokenizer alone, and is used after all."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["fell"])
    with pytest.raises(ValueError, match=rf"rte: .* beyond the {VOCABULARY} rows of the model's"):
        prunus.evaluate(model, "rte", tokenizer=tokenizer, data=local_datasets)


def test_outputs_that_are_no_numbers_are_refused(model, local_datasets):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e38)
        model.lm_head.weight.mul_(1e5)
    with pytest.raises(ValueError, match=r"rte, row 0: the model's outputs are not finite"):
        prunus.evaluate(model, "rte", tokenizer=byte_tokenizer(), data=local_datasets)


def test_without_the_extra_its_name_is_given(model, local_datasets, uninstalled):
    uninstalled("lm_eval")
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[eval\]'"):
        prunus.evaluate(model, "rte", tokenizer=byte_tokenizer(), data=local_datasets)


def test_a_group_cannot_come_from_local_datasets(local_datasets, monkeypatch):
    class Catalogue:
        class Entry:
            cfg = {"group": "mixed", "task": ["rte"]}  # noqa: RUF012

        task_index = {"mixed": Entry}  # noqa: RUF012
        all_tags = all_subtasks = ()

    monkeypatch.setattr(tasks, "_catalogue", lambda names: Catalogue)
    with pytest.raises(ValueError, match="mixed is not a single task with one dataset"):
        load_tasks(["mixed"], folder=local_datasets)


def test_without_network_the_error_offers_local_datasets(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert_refused(
        OSError, r"rows of rte could not be loaded .*no route.*PRUNUS_DATA", load_tasks, ["rte"]
    )
