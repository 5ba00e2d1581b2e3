"""What several verbs of the command line take: each argument's type, metavar and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "DataDir",
    "Device",
    "Json",
    "Memory",
    "Model",
    "RankTimeout",
    "RecipeFile",
    "Trust",
]

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint folder, or hub id (safetensors only).")
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures as JSON.")
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        envvar="PRUNUS_DATA",
        help="Local mirror of the corpora (see docs).",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run model code that comes with the checkpoint, with all your rights (docs/safety.md).",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Budget, such as 8GB.", show_default="what is free"),
]
RankTimeout = Annotated[
    float | None,
    typer.Option(
        "--rank-timeout",
        metavar="SECONDS",
        help="Under torchrun: how long a process may give no sign of life before the others stop.",
        show_default="600",
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE.toml", help="Options from a file; flags override it."),
]
