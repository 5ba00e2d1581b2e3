"""Arguments and options that several verbs share: the type, metavar and help of each.

Defaults stand in the help in words, so that one rule holds for all options: a value of `None` means
that the user gave nothing, and the library decides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = [
    "ADVANCED",
    "BOS_HELP",
    "BosName",
    "ComputeDtype",
    "DataDir",
    "Device",
    "DtypeName",
    "Json",
    "Memory",
    "Model",
    "Overwrite",
    "RankTimeout",
    "Trust",
]

#: The panel of a verb's help that few users need. It stands last.
ADVANCED = "Advanced"

#: Dtypes in which a model can be computed.
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

#: As `prunus.calibration.bos.Bos`, which imports torch; and the help of `--bos` in every verb.
BosName = Literal["auto", "yes", "no"]
BOS_HELP = (
    "Whether the BOS token takes the place of every window's first token. auto: if the tokenizer "
    "puts one before a text. yes: always. no: as in the papers. Default: auto."
)

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
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        envvar="PRUNUS_DATA",
        help="Folder with local copies of the datasets. Default: download them.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE", show_default=False, help="auto, cpu, cuda or cuda:0, … Default: auto."
    ),
]
ComputeDtype = Annotated[
    DtypeName,
    typer.Option(
        metavar="DTYPE",
        show_default=False,
        rich_help_panel=ADVANCED,
        help="Dtype of the computation: auto (as stored), float32, bfloat16 or float16. "
        "Default: auto.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory budget on the host and on the device, such as 8GB. Default: the free memory.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", show_default=False, help="Replace an earlier result of prunus in OUT."
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        show_default=False,
        rich_help_panel=ADVANCED,
        help="Run the model code that comes with the checkpoint. It runs with all your rights.",
    ),
]
RankTimeout = Annotated[
    float | None,
    typer.Option(
        "--rank-timeout",
        metavar="SECONDS",
        rich_help_panel=ADVANCED,
        help="Under torchrun: stop when a process is silent for this long. Default: 600.",
    ),
]
