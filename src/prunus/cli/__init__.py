"""The command line: a verb per command, no logic. Heavy imports wait until a verb runs, so that --help is quick.

pruning.py     prune, plan, inspect
judging.py     eval, bench, generate, doctor
converting.py  fetch, import, pack, unpack
recovering.py  recover
sweeping.py    sweep, report
arguments.py   options that several verbs share
recipe_options.py  one option per field of a recipe
terminal.py    how a verb speaks: results, errors, JSON
"""

from __future__ import annotations

import typer

from prunus.cli.convert import fetch, import_, pack, unpack
from prunus.cli.evaluate import bench, doctor, evaluate, generate
from prunus.cli.prune import inspect, plan, prune
from prunus.cli.recover import recover
from prunus.cli.sweep import report, sweep

__all__ = ["app", "main"]

app = typer.Typer(
    name="prunus",
    help="Prune large language models after training, and see what was lost and won.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verb, _name in (
    (prune, "prune"),
    (plan, "plan"),
    (evaluate, "eval"),
    (inspect, "inspect"),
    (recover, "recover"),
    (fetch, "fetch"),
    (import_, "import"),
    (pack, "pack"),
    (unpack, "unpack"),
    (generate, "generate"),
    (bench, "bench"),
    (doctor, "doctor"),
    (sweep, "sweep"),
    (report, "report"),
):
    app.command(_name)(_verb)


def main() -> None:
    """Entry point of the `prunus` command."""
    app()
