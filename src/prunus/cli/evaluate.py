"""Commands that measure a model: `eval`, `inspect`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prunus.cli.flags import Model, opt, with_flags
from prunus.cli.terminal import is_quiet, note, print_result
from prunus.engine.run_options import RunOptions
from prunus.evaluation.eval_options import TaskOptions, TextOptions
from prunus.evaluation.eval_records import PerplexityResult, side_by_side


@with_flags(RunOptions, only=("rank_timeout",))
@with_flags(TextOptions, TaskOptions)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL…", help="Checkpoints, adapters, GGUF files, or hub ids."),
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
    from prunus.distributed import process_group
    from prunus.evaluation.inspection import stored_size
    from prunus.evaluation.model_input import check_reference, find_model
    from prunus.evaluation.perplexity import check_text, perplexities
    from prunus.evaluation.task_runner import prepare_tasks
    from prunus.reporting.evaluation_sections import evaluation_section

    models = list(dict.fromkeys(models))
    texts = _chosen_texts(perplexity, tasks, reference)
    work = {"rank_timeout": options.pop("rank_timeout", None)}
    rank_timeout = RunOptions.read(None, work).rank_timeout
    shows = not is_quiet()
    of_text, _ = TextOptions.pick(options)
    of_tasks, _ = TaskOptions.pick(options)
    checked = TextOptions.read(None, of_text)
    trusted = checked.trust_remote_code
    for text in texts:
        check_text(text, checked.data)
    for model in models:
        checkpoint = find_model(model, trusted, note)
        if reference is not None:
            check_reference(checkpoint, find_model(reference, trusted, note))
    task_run = None if tasks is None else prepare_tasks(models, tasks, **of_tasks)
    scores: dict[str, list[PerplexityResult]] = {model: [] for model in models}
    with process_group(rank_timeout):
        if texts:
            of_models = perplexities(models, texts, reference=reference, progress=shows, **of_text)
            scores = dict(zip(models, of_models, strict=True))
        results = [] if task_run is None else task_run.run(note)
    measured = [*models, *filter(None, [reference])]
    sizes = {model: stored_size(model, trusted) for model in measured}
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
    """Show shape, dtype, sparsity and N:M patterns of every linear."""
    from prunus.evaluation.inspection import inspect as inspect_checkpoint

    inspection = inspect_checkpoint(model, verify=verify, **options)
    print_result(inspection.as_dict(), inspection.table())
