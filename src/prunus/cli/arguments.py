"""What several verbs of the command line take: each argument's type, metavar and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Batch",
    "Calibration",
    "Damping",
    "DataDir",
    "Device",
    "Dtype",
    "Group",
    "Head",
    "Ignore",
    "Iterations",
    "Json",
    "MaskFrom",
    "MaskOrder",
    "Memory",
    "Method",
    "Model",
    "Only",
    "PatternOption",
    "Propagate",
    "RecipeFile",
    "Refine",
    "RefineRounds",
    "RiaPower",
    "Samples",
    "Seed",
    "Seqlen",
    "Sparsity",
    "Trust",
    "Update",
]

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
    typer.Option(help="magnitude, wanda, wanda-variant, ria, sparsegpt, obs or alps.", show_default="wanda"),
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
        help="linear: one pass, each linear sees all pruning before it; block: as the original, two passes "
        "(weight updates in its order of operations, on one thread).",
        show_default="linear",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Prune only linears with such names; may be repeated."),
]
Head = Annotated[
    bool | None, typer.Option("--head", help="Prune the output head too; refused where it is tied.")
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
    typer.Option(
        help="For methods that invert a Gram: share of its mean diagonal.",
        show_default="0.01; by the number of tokens for alps, swaps and lsq",
    ),
]
RiaPower = Annotated[
    float | None, typer.Option(help="For ria: exponent of the input norms.", show_default="0.5")
]
Iterations = Annotated[int | None, typer.Option(help="For alps.", show_default="24")]
Refine = Annotated[
    str | None,
    typer.Option(
        help="Look over the mask of any method: dsnot (until mean outputs are right) or swaps (as long as they "
        "lower the output error).",
        show_default="none",
    ),
]
RefineRounds = Annotated[
    int | None, typer.Option(help="Most rounds of --refine.", show_default="50 for dsnot, 100 for swaps")
]
Update = Annotated[
    str | None,
    typer.Option(
        help="lsq: the best weights for the mask, whatever method it is from, by least squares.",
        show_default="none",
    ),
]
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Budget, such as 8GB.", show_default="what is free")
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE.toml", help="Options from a file; flags override it.")
]
