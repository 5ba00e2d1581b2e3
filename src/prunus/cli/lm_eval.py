"""The verb `lm-eval`: the command line of lm-eval, with packed checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from prunus.cli.terminal import user_errors


def lm_eval(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="ARGUMENT…", help="Arguments of lm-eval, handed over as they are."),
    ],
) -> None:
    """Run lm-eval's own command line with packed models.

    lm-eval loads models through transformers, which knows packed checkpoints only after prunus was
    imported. Everything else is lm-eval's: options, output and exit status.
    """
    with user_errors(None):
        from prunus.evaluation.tasks import run_lm_eval

        run_lm_eval(arguments)
