"""Arguments and options that several verbs share, and that no model of options declares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunus.options.declaration import ADVANCED
from prunus.runs.options import DtypeName

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id (safetensors only).")
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Also write all figures to FILE as JSON; - is standard output.",
    ),
]
ComputeDtype = Annotated[
    DtypeName,
    typer.Option(
        metavar="DTYPE",
        show_default=False,
        rich_help_panel=ADVANCED,
        help="Compute in this dtype: auto (as stored), float32, bfloat16 or float16. "
        "Default: auto.",
    ),
]
