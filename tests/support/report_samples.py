"""Small inputs of reports: a sweep, an evaluation, a measurement, hostile names."""

import json
import math
from pathlib import Path

from prunus.document import Document, Section, Table
from prunus.evaluation.eval_records import PerplexityResult, compare
from prunus.pruning.manifest import Manifest
from prunus.pruning.recipe import Recipe
from prunus.reporting.write import report
from prunus.sweeping.results import CellResult, DenseResult, SweepResults

HOSTILE = (
    """<script>window.owned=1</script><img src=x onerror="window.owned=1">"""
    """'"|*_`[a](javascript:owned=1)&amp;"""
)


DIVERGENCE = {
    "reference": "dense",
    "kl_stderr": 0.01,
    "kl_q999": 2.5,
    "same_top": 0.75,
    "same_top_stderr": 0.02,
    "reference_perplexity": 20.5,
    "perplexity_ratio": 1.5,
    "perplexity_ratio_stderr": 0.1,
}


def sweep_results(
    name: str = "smol",
    text: str = "wikitext2",
    error: str | None = None,
    other: str | float = "2:4",
) -> SweepResults:
    """A sweep with everything: 50% and `other`, seeds, tasks, a recovery, failures."""

    def scores(perplexity: float | None) -> dict[str, PerplexityResult]:
        numbers = {"loss": 1.0, "windows": 2, "tokens": 32, "seqlen": 16, "seconds": 1.5}
        return {
            text: PerplexityResult(
                source=f"{text} source",
                perplexity=math.inf if perplexity is None else perplexity,
                protocol=f"{text} protocol",
                bos="no",
                **numbers,
            )
        }

    def tasks(value: float) -> dict[str, dict[str, dict[str, float]]]:
        boolq = {"acc,none": value, "acc_stderr,none": 0.0123}
        return {"results": {"boolq": boolq, "lambada": {"perplexity,none": 9.5}}}

    done = {
        "weights": 1000,
        "zeros": 500,
        "sparsity": 0.5,
        "mean_relative_output_error": None,
        "mean_removed_energy": 0.0375,
        "block_seconds": 12.25,
        "dtype": "float32",
        "calibration": "c4, shard 0, no BOS added to windows",
        "calibration_sha256": "ab",
    }
    figures = {
        ("magnitude", 0.5, 0): 522.02,
        ("magnitude", other, 0): None,
        ("wanda", 0.5, 0): 31.25,
        ("wanda", 0.5, 1): 32.75,
        ("wanda", other, 0): 61.5,
    }
    if not isinstance(other, str):  # a chart over sparsity is drawn from three on
        figures["wanda", 0.7, 0] = 61.5
    cells = []
    for (method, shape, seed), perplexity in figures.items():
        where = {"pattern": shape} if isinstance(shape, str) else {"sparsity": shape}
        recipe = Recipe(method=method, seed=seed, **where)
        cell = CellResult(
            name=f"{name}-{method}-{shape}-{seed}", model=name, recipe=recipe, state="done"
        )
        cells.append(
            cell.model_copy(
                update={"pruning": done, "scores": scores(perplexity), "tasks": tasks(0.5)}
            )
        )
    recovered = cells[2].model_copy(
        update={
            "name": f"{name}-wanda+lora",
            "recovery": "lora",
            "scores": scores(27.5),
            "recovered": {"seconds": 99.0},
            "pruning": None,
        }
    )
    failed = CellResult(
        name=f"{name}-sparsegpt",
        model=name,
        recipe=Recipe(method="sparsegpt"),
        state="failed",
        error=error or "OSError: full",
    )
    model = DenseResult(path=name, fingerprint="f", scores=scores(20.5), tasks=tasks(0.7))
    return SweepResults(
        file="table.toml",
        title=f"Sweep of {name}",
        description="What it is\n  for.",
        scoring={"texts": [text], "tasks": ["boolq", "lambada"]},
        hardware={"processor": "EPYC", "cores": 2},
        versions={"torch": "2.13"},
        models={name: model},
        cells=[*cells, recovered, failed],
    )


def evaluation(first: str = "dense", second: str = "pruned") -> dict:
    """As `prunus eval dense pruned --json` writes it."""

    def perplexity(value: float) -> dict:
        return PerplexityResult(
            "wikitext2", value, 3.0, 24, 24576, 1024, "raw lines", 9.5
        ).as_dict()

    def tasks(*outcomes: float) -> dict:
        values = {"acc,none": sum(outcomes) / 4, "acc_stderr,none": 0.25, "acc_norm,none": 0.125}
        return {
            "results": {"boolq": values | {"sample_len": 4}},
            "n-shot": {"boolq": 0},
            "config": {"model_dtype": "float32"},
            "samples": {"boolq": [{"filter": "none", "acc": x} for x in outcomes]},
        }

    results = {first: tasks(1.0, 1.0, 1.0, 0.0), second: tasks(1.0, 0.0, 0.0, 0.0)}
    return {
        "models": [
            {"model": model, "perplexity": [perplexity(value)], "tasks": of_tasks}
            for (model, of_tasks), value in zip(results.items(), (19.125, 42.5), strict=True)
        ],
        "differences": [change.as_dict() for change in compare(results)],
    }


def compared_evaluation(*names: str) -> dict:
    """As `prunus eval NAMES --reference dense --json` writes it, with sizes and divergences."""
    content = evaluation()
    first = content["models"][0]
    content["reference"] = {
        "model": "dense",
        "size": {"file_bytes": 9 * 10**9, "bits_per_weight": 16.0},
    }
    content["models"] = [
        first
        | {
            "model": name,
            "size": {"file_bytes": 10**9 * (k + 1), "bits_per_weight": 2.0 * (k + 1)},
            "perplexity": [first["perplexity"][0] | {"divergence": DIVERGENCE | {"kl": 0.25}}],
            "tasks": None,
        }
        for k, name in enumerate(names)
    ]
    return content | {"differences": []}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def whole_document(tmp_path: Path, run: Path) -> Document:
    """A run, a sweep and an evaluation in one report."""
    (tmp_path / "sweep").mkdir()
    sweep_results(other=0.6).save(tmp_path / "sweep")
    return report(
        [run, tmp_path / "sweep", write(tmp_path / "eval.json", evaluation())],
        title="All of it",
    )


def hostile_document(tmp_path: Path, run: Path) -> Document:
    """Hostile text wherever a user, a model or a file name can put some."""
    manifest = Manifest.load(run)
    manifest.source = HOSTILE
    manifest.inputs.calibration = HOSTILE
    manifest.blocks[0].name = HOSTILE
    manifest.blocks[0].linears[HOSTILE] = (
        manifest.blocks[0].linears["mlp.up_proj"].model_copy(update={"notes": {HOSTILE: HOSTILE}})
    )
    (tmp_path / "run").mkdir()
    manifest.save(tmp_path / "run")
    (tmp_path / "sweep").mkdir()
    results = sweep_results(HOSTILE, HOSTILE, HOSTILE, other=0.6)
    results.description = results.file = HOSTILE
    results.save(tmp_path / "sweep")
    return report(
        [
            tmp_path / "run",
            tmp_path / "sweep",
            write(tmp_path / "e.json", evaluation(HOSTILE, "x" + HOSTILE)),
        ],
        title=HOSTILE,
    )


def rows(section: Section, title: str) -> list[dict[str, object]]:
    """The rows of the table whose title begins with `title`: column title -> raw value."""
    [part] = [
        part
        for part in (*section.parts, *section.details)
        if isinstance(part, Table) and part.title.startswith(title)
    ]
    names = [column.title for column in part.columns]
    return [dict(zip(names, row, strict=True)) for row in part.rows]


def table(section: Section, title: str, key: int = 0) -> dict[object, dict[str, object]]:
    """The same, by the cell in column `key`."""
    return {list(row.values())[key]: row for row in rows(section, title)}
