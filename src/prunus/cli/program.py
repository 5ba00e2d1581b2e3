"""The command line: a file for each group of commands. What a command does is in the rooms below.

write_model.py     prune, compress, shrink, plan, recover
plan.py            what plan does, also for Python
evaluate.py        eval, inspect, sweep, report
use.py             generate, import
flags.py           flags from the declarations of options, and flags that commands share
terminal.py        results, log lines, errors and JSON

A command imports what it needs when it runs: `--help` does not wait for torch.
"""

from __future__ import annotations

import contextlib
import copy
import re
import textwrap
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Annotated, Any

import typer
import typer.core

from prunus.cli.evaluate import evaluate, inspect, report, sweep
from prunus.cli.flags import FLAGS, JSON, QUIET
from prunus.cli.terminal import command, log
from prunus.cli.use import generate, import_
from prunus.cli.write_model import compress, plan, prune, recover, shrink
from prunus.words import did_you_mean

__all__ = ["app", "main"]


#: Panel of the help -> its commands. The name of a function that Python reserves ends with _.
_PANELS: dict[str, tuple[Callable[..., Any], ...]] = {
    "Make a model smaller": (prune, compress, shrink, recover, plan),
    "Measure and compare models": (evaluate, inspect, sweep, report),
    "Use a model, or store it in another form": (generate, import_),
}
#: What `prunus` alone shows below the commands.
_FIRST_EXAMPLES = """Examples:
prunus prune HuggingFaceTB/SmolLM2-135M pruned --preset balanced
prunus compress HuggingFaceTB/SmolLM2-135M small.gguf --size 90MB
prunus eval pruned small.gguf --reference HuggingFaceTB/SmolLM2-135M"""
#: Two examples for each command, in the order of the help.
_EXAMPLES = """
prunus prune HuggingFaceTB/SmolLM2-135M pruned --preset balanced
prunus prune dense pruned --method sparsegpt --pattern 2:4 --samples 64
prunus compress HuggingFaceTB/SmolLM2-135M small.gguf --size 90MB
prunus compress dense small --bits 4
prunus shrink allenai/OLMoE-1B-7B-0924 smaller --experts 0.25
prunus shrink dense smaller --blocks 0.1 --samples 32
prunus plan dense pruned --preset best --memory 8GB
prunus plan allenai/OLMoE-1B-7B-0924 small.gguf --bits 3
prunus recover pruned recovered --tokens 1000000
prunus recover pruned adapter --mode lora --teacher dense --minutes 30
prunus eval pruned --reference dense --perplexity wikitext2,c4
prunus eval dense pruned --tasks paper7 --limit 200 --json scores.json
prunus inspect pruned
prunus inspect pruned --json linears.json
prunus generate small.gguf --prompt "The capital of France is"
prunus generate small.gguf --prompt "Name a fruit" --chat --seed 1
prunus import model.gguf dense
prunus import model.gguf dense --dtype float32 --overwrite
prunus sweep grid.toml results --check
prunus sweep grid.toml results --model dense --device cuda
prunus report pruned -o run.html
prunus report results scores.json -o comparison.md
"""
#: Commands that say nothing of their progress.
_SILENT = {generate, inspect}
#: Commands that continue an interrupted run.
_RESUMING = {prune, compress, shrink, recover, sweep}
#: The class of errors about arguments, which typer does not name.
_UsageError: Any = typer.BadParameter.__base__
#: Commands whose name is not that of their function.
_NAMES = {evaluate: "eval", import_: "import"}
#: What users may look for, by its name in other programs or in earlier versions -> what to use. It
#: is said of names that are no command.
_ELSEWHERE = {
    **dict.fromkeys(
        ("quantize", "quantise", "quant", "gptq", "awq"), "prunus compress rounds weights"
    ),
    "convert": "prunus compress MODEL OUT.gguf writes a GGUF file, and prunus import reads one",
    "dequantize": "prunus import turns a GGUF file into a checkpoint",
    "sparsify": "prunus prune removes weights",
    **dict.fromkeys(("distill", "finetune", "train"), "prunus recover trains"),
    **dict.fromkeys(("evaluate", "perplexity", "ppl", "score"), "prunus eval scores models"),
    **dict.fromkeys(("info", "show"), "prunus inspect describes a model"),
    **dict.fromkeys(("chat", "run"), "prunus generate --chat answers a prompt"),
    "help": "prunus --help lists the commands",
    "version": "prunus --version shows it",
    # Removed in 0.4.0.
    "pack": "it was removed in 0.4.0, because zeros take no less room in any format that other "
    "programs read; prunus compress makes smaller files",
    "unpack": "it was removed in 0.4.0; version 0.3 of prunus unpacks its packed folders",
    "bench": "it was removed in 0.4.0; llama-bench or mlx_lm.benchmark time a result",
    "serve": "it was removed in 0.4.0; llama-server, transformers serve, vLLM and mlx_lm.server "
    "serve results",
    "doctor": "it was removed in 0.4.0; prunus --version shows the version",
}
#: A command with more options than this beyond its first panel shows them in `--help-all` alone.
_FEW = 3


class _Commands(typer.core.TyperGroup):
    """All commands. What typer finds wrong on a command line is said as all other errors are."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the command line up to the name of the command."""
        with _one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Parse the rest of the command line, and run the command."""
        with _one_line():
            return super().invoke(ctx)


class _Command(typer.core.TyperCommand):
    """A command whose `--help` shows the common options in brief; its `--help-all` shows all."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, of a copy of this command that has the shorter texts and fewer options.

        The command itself must keep all options, because the command line is parsed with them.
        """
        shown = copy.copy(self)
        common = [
            parameter
            for parameter in self.params
            if getattr(parameter, "rich_help_panel", None) is None
        ]
        rare = len(self.params) - len(common)
        # The lines of a paragraph are joined, so that they fill the terminal.
        paragraphs = (self.help or "").split("\n\n")
        shown.help = "\n\n".join(" ".join(lines.splitlines()) for lines in paragraphs)
        if rare > _FEW and not ctx.meta.get(_ALL):
            shown.params = [_brief(parameter) for parameter in common]
            shown.epilog = (
                f"prunus {self.name} --help-all shows {rare} more options.\n{self.epilog}"
            )
        # The method of this class would begin anew with the copy.
        typer.core.TyperCommand.format_help(shown, ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """What a shell offers for what is typed so far. fish takes one line for each offer."""
        offers = super().shell_complete(ctx, incomplete)
        for offer in offers:
            offer.help = textwrap.shorten((offer.help or "").split(". ")[0], 76)
        return offers


def _brief(parameter: Any) -> Any:
    """A parameter with the first sentence of its help, and its default."""
    shown = copy.copy(parameter)
    text, default, value = (parameter.help or "").partition(" Default: ")
    sentence, stop, _ = text.partition(". ")
    shown.help = sentence + stop.rstrip() + default + value
    return shown


#: Key in a context of typer: the help shows all options.
_ALL = "prunus.help_all"


def _show_all(ctx: typer.Context, is_given: bool) -> None:
    """Show the help with all options, and exit, if the flag `--help-all` is given."""
    if is_given:
        ctx.meta[_ALL] = True
        typer.echo(ctx.get_help())
        raise typer.Exit


_HELP_ALL = Annotated[
    bool,
    typer.Option("--help-all", is_eager=True, callback=_show_all, expose_value=False, hidden=True),
]


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Turn typer's errors about a command line into one line, and exit with status 2."""
    try:
        yield
    except _UsageError as fault:
        # Without arguments the help is shown, which typer treats as an error of this kind.
        if type(fault).__name__ == "NoArgsIsHelpError":
            raise
        said = fault.format_message().replace("Value error, ", "").rstrip(".")
        # typer lists the choices of an option as 'a', 'b', 'c'.
        said = re.sub(
            "'([^']*)' is not one of (.*)",
            lambda x: x[0] + did_you_mean(x[1], re.findall("'(.*?)'", x[2])),
            said,
        )
        unknown = re.match("No such command '([^']*)'", said)
        if unknown and unknown[1] in _ELSEWHERE:
            said = f"{unknown[0]}: {_ELSEWHERE[unknown[1]]}"
        where = fault.ctx.command_path if fault.ctx else "prunus"
        log(f"error: {said} (see {where} --help)")
        raise typer.Exit(2) from None


app = typer.Typer(
    name="prunus",
    cls=_Commands,
    epilog=_FIRST_EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_given: bool) -> None:
    """Print the version and what counts on this machine, and exit, if `--version` is given."""
    if is_given:
        from prunus.hardware.machine import describe_machine

        print("\n".join(f"{name} {words}" for name, words in describe_machine().items()))
        raise typer.Exit


@app.callback()
def _prunus(
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Show versions and kernels, and exit.",
        ),
    ] = False,
) -> None:
    """Make large language models smaller after training, and measure what it costs."""


for _panel, _functions in _PANELS.items():
    for _function in _functions:
        _name = _NAMES.get(_function, _function.__name__)
        _lines = [line for line in _EXAMPLES.splitlines() if line.split()[1:2] == [_name]]
        _quiet = {} if _function in _SILENT else {"quiet": QUIET}
        _shared: dict[str, Any] = {"json_file": JSON, **_quiet, "help_all": _HELP_ALL}
        _command = command(_function, _shared, _function in _RESUMING)
        FLAGS.update(signature(_command).parameters)
        app.command(
            _name,
            cls=_Command,
            rich_help_panel=_panel,
            # The epilog keeps its line breaks: an example is one line that can be copied.
            epilog="\n".join(("Examples:", *_lines)),
        )(_command)


def main() -> None:
    """Entry point of the `prunus` command, and of `python -m prunus`, which shows the same name."""
    app(prog_name="prunus")
