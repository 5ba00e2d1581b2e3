"""The verb that wins quality back after pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.cli import arguments as arg
from prunus.cli.flags import opt, with_flags
from prunus.cli.terminal import Counted, print_result, progress_console, user_errors
from prunus.recovery.options import RecoveryOptions
from prunus.runs.options import RunOptions


@with_flags(RecoveryOptions, RunOptions, without=("memory", "trust_remote_code"))
def recover(
    model: arg.Model,
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Folder for the recovered checkpoint; in mode lora, the adapter."
        ),
    ],
    *,
    teacher: Annotated[
        str | None,
        opt("Learn the logits of this dense model. Default: learn the text.", "DENSE"),
    ] = None,
    json_file: arg.Json = None,
    **options: Any,
) -> None:
    """Recover quality by a short training that keeps the zeros.

    In a compressed model it trains the scales, and the integers stay.

    A recovery that was stopped or killed continues when you give the same command again. Under
    torchrun, the processes split the windows of every step; --batch must be at least their number.
    """
    with user_errors(json_file):
        from prunus.recovery.run import recover as train
        from prunus.reporting.progress import show_recovery
        from prunus.reporting.tables import recovery_table

        given = {name: value for name, value in options.items() if value is not None}
        title = f"{given.get('mode', 'scales')} {output}"
        with show_recovery(title, progress_console()) as progress:
            steps = Counted(progress)
            record = train(model, output, teacher=teacher, progress=steps, **given)
        steps.log_if_none(output)
        print_result(recovery_table(record), json_file, record.model_dump(mode="json"))
