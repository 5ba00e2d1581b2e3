"""The command line: one file per group of verbs, no logic.

prune.py           prune, compress, plan
shrink.py          shrink
evaluate.py        eval, bench
generate.py        generate
look.py            inspect, doctor
serve.py           serve
convert.py         import, pack, unpack
lm_eval.py         lm-eval
recover.py         recover
sweep.py           sweep, report
arguments.py       arguments and options that several verbs share
recipe_options.py  the options of a recipe
terminal.py        results, log lines, errors and JSON

A verb imports what it needs when it runs: `--help` does not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple

import typer

from prunus.cli.convert import import_, pack, unpack
from prunus.cli.evaluate import bench, evaluate
from prunus.cli.generate import generate
from prunus.cli.lm_eval import lm_eval
from prunus.cli.look import doctor, inspect
from prunus.cli.prune import compress, plan, prune
from prunus.cli.recover import recover
from prunus.cli.serve import serve
from prunus.cli.shrink import shrink
from prunus.cli.sweep import report, sweep
from prunus.cli.terminal import may_be_quiet

__all__ = ["app", "main"]


class _Verb(NamedTuple):
    """A verb: its name, the function that runs it, its panel in `--help`, and two examples."""

    name: str
    function: Callable[..., Any]
    panel: str
    examples: tuple[str, str]


_VERBS = (
    _Verb(
        "prune",
        prune,
        "Prune",
        (
            "prunus prune HuggingFaceTB/SmolLM2-135M pruned --preset balanced",
            "prunus prune dense pruned --method sparsegpt --pattern 2:4 --samples 64",
        ),
    ),
    _Verb(
        "compress",
        compress,
        "Prune",
        (
            "prunus compress HuggingFaceTB/SmolLM2-135M small --bits 3",
            "prunus compress dense small --bits 2.5 --head-bits 6 --samples 32",
        ),
    ),
    _Verb(
        "shrink",
        shrink,
        "Prune",
        (
            "prunus shrink allenai/OLMoE-1B-7B-0924 smaller --experts 0.25",
            "prunus shrink dense smaller --blocks 0.1 --width 0.25 --samples 32",
        ),
    ),
    _Verb(
        "plan",
        plan,
        "Prune",
        (
            "prunus plan dense pruned --preset best --memory 8GB",
            "prunus plan allenai/OLMoE-1B-7B-0924 --bits 3",
        ),
    ),
    _Verb(
        "recover",
        recover,
        "Prune",
        (
            "prunus recover pruned recovered --mode masked --tokens 1000000",
            "prunus recover pruned adapter --mode lora --teacher dense --minutes 30",
        ),
    ),
    _Verb(
        "eval",
        evaluate,
        "Evaluate",
        (
            "prunus eval pruned --reference dense --perplexity wikitext2,c4",
            "prunus eval dense pruned --tasks paper7 --limit 200 --json scores.json",
        ),
    ),
    _Verb(
        "lm-eval",
        lm_eval,
        "Evaluate",
        (
            "prunus lm-eval --model hf --model_args pretrained=packed --tasks arc_easy",
            "prunus lm-eval ls tasks",
        ),
    ),
    _Verb(
        "inspect",
        inspect,
        "Evaluate",
        ("prunus inspect pruned", "prunus inspect pruned --json linears.json"),
    ),
    _Verb(
        "bench",
        bench,
        "Evaluate",
        (
            "prunus bench dense packed --prompt-tokens 512 --new-tokens 128",
            "prunus bench dense packed --threads 4 --json speed.json",
        ),
    ),
    _Verb(
        "generate",
        generate,
        "Evaluate",
        (
            'prunus generate packed --prompt "The capital of France is"',
            "prunus generate packed --chat --temperature 0.7 --top-p 0.9 --seed 1",
        ),
    ),
    _Verb(
        "serve",
        serve,
        "Serve",
        (
            "prunus serve packed",
            "prunus serve packed --host 0.0.0.0 --port 8080 --max-concurrent 2",
        ),
    ),
    _Verb(
        "import",
        import_,
        "Convert",
        (
            "prunus import model.gguf dense",
            "prunus import model.gguf dense --dtype float32 --overwrite",
        ),
    ),
    _Verb(
        "pack",
        pack,
        "Convert",
        (
            "prunus pack pruned packed",
            "prunus pack pruned packed --values int8 --perplexity wikitext2",
        ),
    ),
    _Verb(
        "unpack",
        unpack,
        "Convert",
        ("prunus unpack packed pruned", "prunus unpack packed pruned --overwrite"),
    ),
    _Verb(
        "sweep",
        sweep,
        "Compare",
        (
            "prunus sweep grid.toml results --check",
            "prunus sweep grid.toml results --model dense --device cuda",
        ),
    ),
    _Verb(
        "report",
        report,
        "Compare",
        (
            "prunus report pruned -o run.html",
            "prunus report results scores.json -o comparison.md",
        ),
    ),
    _Verb(
        "doctor",
        doctor,
        "Environment",
        ("prunus doctor", "prunus doctor --json kernels.json"),
    ),
)

app = typer.Typer(
    name="prunus",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"prunus {version('prunus')}")
        raise typer.Exit


@app.callback()
def _prunus(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Prune large language models after training, and measure the result."""


#: Verbs that work for a while and say how far they are. The others print their result alone.
_WORKING = {
    prune,
    compress,
    shrink,
    recover,
    evaluate,
    bench,
    import_,
    pack,
    unpack,
    sweep,
    report,
}

#: Arguments that typer does not know go to the function as they are.
_HANDED_OVER = {"ignore_unknown_options": True}

for _verb in _VERBS:
    # The epilog keeps its line breaks: an example is one line that can be copied.
    _epilog = "\n".join(("Examples:", *_verb.examples))
    app.command(
        _verb.name,
        rich_help_panel=_verb.panel,
        epilog=_epilog,
        context_settings=_HANDED_OVER if _verb.function is lm_eval else None,
    )(may_be_quiet(_verb.function) if _verb.function in _WORKING else _verb.function)


def main() -> None:
    """Entry point of the `prunus` command."""
    app()
