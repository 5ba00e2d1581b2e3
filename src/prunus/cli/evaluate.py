"""Commands that measure and compare models: `eval`, `inspect`, `sweep`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.cli.flags import Model, opt, with_flags
from prunus.cli.terminal import is_quiet, log, note, print_result, write_json
from prunus.engine.run_options import RunOptions
from prunus.evaluation.eval_options import TaskOptions, TextOptions
from prunus.evaluation.eval_records import PerplexityResult, side_by_side


@with_flags(RunOptions, only=("rank_timeout",))
@with_flags(TextOptions, TaskOptions)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL…", help="Checkpoints, GGUF files, or hub ids."),
    ],
    perplexity: Annotated[
        str | None,
        opt(
            "Score on these texts: wikitext2, c4, ptb, python-docs, python-code, chats (in the "
            "model's template) or files, several at once. Default: wikitext2, if no tasks are "
            "given.",
            "TEXT,…",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        opt(
            "Score on these tasks of lm-eval. paper7: boolq, rte, hellaswag, winogrande, arc_easy, "
            "arc_challenge, openbookqa.",
            "TASK,…",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        opt(
            "Compare predictions with this model, such as the dense one, side by side. Figures are "
            "KL divergence, same most likely token and ratio of perplexities, and differences "
            "between the models.",
            "MODEL",
        ),
    ] = None,
    **options: Any,
) -> None:
    """Score models by perplexity and tasks of lm-eval.

    Several models are shown in one table. --reference also says how far each model is from the
    dense one. Under torchrun, processes share windows and rows, and each holds the whole model.
    """
    models = list(dict.fromkeys(models))
    texts = _chosen_texts(perplexity, tasks, reference)
    work = {"rank_timeout": options.pop("rank_timeout", None)}
    rank_timeout = RunOptions.read(None, work).rank_timeout
    shows = not is_quiet()
    of_text, _ = TextOptions.pick(options)
    of_tasks, _ = TaskOptions.pick(options)
    checked = TextOptions.read(None, of_text)
    TaskOptions.read(None, of_tasks)
    trusted = checked.trust_remote_code
    from prunus.distributed import process_group
    from prunus.evaluation.inspection import stored_size
    from prunus.evaluation.model_input import check_reference, find_model
    from prunus.evaluation.perplexity import check_text, perplexities
    from prunus.evaluation.task_scores import prepare_tasks
    from prunus.reporting.evaluation_sections import evaluation_section

    for text in texts:
        check_text(text, checked.data)
    every = dict.fromkeys(models if reference is None else [*models, reference])
    found = {model: find_model(model, trusted, note) for model in every}
    inputs, compared = [found[x] for x in models], None if reference is None else found[reference]
    for model in inputs:
        if compared is not None:
            check_reference(model, compared)
    on_tasks = [] if tasks is None else prepare_tasks(inputs, tasks, **of_tasks)
    scores: dict[str, list[PerplexityResult]] = {model: [] for model in models}
    with process_group(rank_timeout):
        if texts:
            of_models = perplexities(inputs, texts, reference=compared, progress=shows, **of_text)
            scores = dict(zip(models, of_models, strict=True))
    results = {model: score(shows) for model, score in zip(models, on_tasks, strict=False)}
    sizes = {model: stored_size(one.folder) for model, one in found.items() if one.folder}
    content = side_by_side(scores, results, sizes, reference)
    print_result(content, evaluation_section(content))


def _chosen_texts(perplexity: str | None, tasks: str | None, reference: str | None) -> list[str]:
    """The texts to score on, from the values of three flags; None is a flag that is not given."""
    if perplexity is None and tasks is None:
        return ["wikitext2"]
    names = (text.strip() for text in (perplexity or "").split(","))
    texts = list(dict.fromkeys(name for name in names if name))
    if perplexity is not None and not texts:
        raise ValueError("--perplexity names no texts; give some, such as wikitext2")
    if reference is not None and not texts:
        raise ValueError(
            "--reference compares predictions on a text, and --tasks alone scores none: add "
            "--perplexity TEXT, such as wikitext2"
        )
    return texts


@with_flags(RunOptions, only=("trust_remote_code",))
def inspect(
    model: Model,
    other: Annotated[
        str | None,
        typer.Argument(
            metavar="OTHER",
            help="Compare the zeros with this model or masks, or a GGUF file with this one.",
        ),
    ] = None,
    *,
    verify: Annotated[
        bool,
        opt(
            "Compare every shard first with the SHA-256 in the record of the run that wrote it.",
            names=("--verify",),
        ),
    ] = False,
    **options: Any,
) -> None:
    """Show shape, dtype, sparsity and N:M patterns of every linear.

    With OTHER, also show how far the zeros of both agree.

    Of a GGUF file, also show its types and bits per weight, and which types are larger than those
    of the preset in its name. Two files are shown side by side.
    """
    from prunus.evaluation.inspection import inspect as inspect_checkpoint

    inspection = inspect_checkpoint(model, other, verify=verify, **options)
    print_result(inspection.as_dict(), *inspection.tables())


@with_flags(RunOptions, without=("overwrite", "resume"))
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The grid of runs.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the results.")],
    *,
    models: Annotated[
        list[str] | None,
        opt(
            "Use this model in place of those in the file; may be repeated.",
            "MODEL",
            names=("--model",),
        ),
    ] = None,
    check: Annotated[
        bool, opt("Check everything and list the cells; run and write nothing.", names=("--check",))
    ] = False,
    **options: Any,
) -> None:
    """Prune and score a grid of models, methods and sparsities.

    Scores are perplexity, KL divergence from the dense model, and accuracy on tasks.

    A killed sweep continues when you give the same command again. It keeps the figures of texts and
    models that are what they were, and measures the others again.
    """
    from prunus.sweeping.grid import Sweep

    chosen, how = Sweep.read(file, {"models": models}), RunOptions.read(None, options)
    from prunus.reporting.sweep_section import check_section, sweep_section
    from prunus.sweeping.sweep import check_sweep
    from prunus.sweeping.sweep import sweep as run_sweep

    if check:
        results = check_sweep(chosen, output, how, file.name)
    else:
        results = run_sweep(file, output, models=models or (), progress=note, **options)
    print_result(results, check_section(results) if check else sweep_section(results))
    failed = sum(cell.state == "failed" for cell in results.cells)
    if failed:
        log(f"{failed} of {len(results.cells)} cells failed; the same command tries them again")
        raise typer.Exit(1)


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|SWEEP|EVAL…",
            help="Folders of prune, compress, shrink or sweep, and files of eval --json.",
        ),
    ],
    output: Annotated[
        Path | None,
        opt(
            "Write a page (.html), Markdown (.md), one table (.csv), LaTeX (.tex), or a figure "
            "(.svg, .png, .pdf). Default: print tables.",
            "FILE",
            names=("--output", "-o"),
        ),
    ] = None,
    title: Annotated[
        str | None, opt("Set the title of the report. Default: that of its first section.", "TEXT")
    ] = None,
) -> None:
    """Show runs, sweeps and evaluations as tables or figures."""
    from prunus.reporting.page import document_json
    from prunus.reporting.write import report as write_report

    document = write_report(paths, output, title=title)
    content = document_json(document)
    if output is None:
        print_result(content, document)
        return
    write_json(content)
    note(f"wrote {output}, {output.stat().st_size / 1e6:.1f} MB")
