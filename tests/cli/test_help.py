"""The help of every verb: quick, in panels, with choices and with examples that can be copied."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from typing import get_args

import pytest
import typer
from prunus.cli.recipe_options import COMPRESSION, OPTIONS, RECIPE_ONLY
from typer.main import get_command

from command_line import call
from prunus.cli import app
from prunus.pruning.recipe import Recipe
from prunus.recovery.options import MODES, RecoveryOptions
from prunus.structure.recipe import StructureRecipe

VERBS = [
    "prune",
    "compress",
    "shrink",
    "plan",
    "recover",
    "eval",
    "lm-eval",
    "inspect",
    "bench",
    "generate",
    "serve",
    "import",
    "pack",
    "unpack",
    "sweep",
    "report",
    "doctor",
]
COMMANDS = get_command(app).commands


def test_help_lists_the_verbs_in_panels_with_one_line_each():
    assert list(COMMANDS) == VERBS
    output = call("--help").output
    panels = ["Prune", "Evaluate", "Serve", "Convert", "Compare", "Environment"]
    positions = [output.index(f"─ {panel} ─") for panel in panels]
    assert positions == sorted(positions)
    verbs = output[positions[0] :].splitlines()
    lines = [line for line in verbs if line.startswith("│")]
    assert [line.split()[1] for line in lines] == VERBS, "a verb's line must not be wrapped"


def test_version():
    assert call("--version").stdout == f"prunus {version('prunus')}\n"


def test_help_of_every_verb_is_quick():
    """In a process of its own: torch takes seconds to import, and no help needs it."""
    script = f"""
import sys
from typer.testing import CliRunner
from prunus.cli import app
import prunus.cli.recipe_options, prunus.cli.terminal
for verb in {[[], *[[verb] for verb in VERBS]]}:
    for flag in ("--help", "-h"):
        result = CliRunner().invoke(app, [*verb, flag])
        assert result.exit_code == 0, result.output
        assert "Usage: " in result.output and " ".join(verb) in result.output
slow = {{"torch", "transformers", "numpy", "datasets"}} & set(sys.modules)
assert not slow, slow
import prunus
assert prunus.Recipe().sparsity == 0.5
assert not {{"torch", "transformers"}} & set(sys.modules), "a recipe knows nothing of torch"
assert callable(prunus.prune) and "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_every_field_of_a_recipe_has_a_flag_or_stands_in_recipe_files_alone():
    assert set(OPTIONS).isdisjoint(RECIPE_ONLY)
    assert {*OPTIONS, *RECIPE_ONLY} == set(Recipe.model_fields)
    for verb in ("prune", "plan", "compress"):
        taken = {parameter.name: parameter for parameter in COMMANDS[verb].params}
        left_out = {"prune": COMPRESSION, "compress": ("preset",)}.get(verb, ())
        assert set(OPTIONS) - set(left_out) <= set(taken), verb
        assert not set(RECIPE_ONLY) & set(taken), verb
        assert all(name in taken["recipe"].help for name in RECIPE_ONLY)


def choices_of(annotation: object) -> set[str]:
    """All words of the Literal types in a type."""
    if isinstance(annotation, str):
        return {annotation}
    return {word for part in get_args(annotation) for word in choices_of(part)}


@pytest.mark.parametrize("name", OPTIONS)
def test_choices_are_those_of_the_recipe_and_stand_in_the_help(name):
    kind, option = get_args(OPTIONS[name])
    allowed = choices_of(Recipe.model_fields[name].annotation)
    if name == "preset":
        from prunus.pruning.presets import MAX, PRESETS

        allowed = {*PRESETS, MAX}
    elif name in ("dense_weight", "group"):
        allowed = set()  # a word or a number
    assert choices_of(kind) == allowed
    hidden = {"none"} if "Default: none" in option.help else set()
    assert all(word in option.help for word in allowed - hidden)


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("prune", Recipe),
        ("compress", Recipe),
        ("recover", RecoveryOptions),
        ("shrink", StructureRecipe),
    ],
)
def test_defaults_in_the_help_are_those_of_the_options(verb, options):
    compared = 0
    for parameter in COMMANDS[verb].params:
        said = re.search(r"Default: (\d+(?:\.\d+)?|[a-z-]+(?=\.))", parameter.help or "")
        field = options.model_fields.get(parameter.name)
        if said is None or field is None or isinstance(field.default, bool | None):
            continue
        default = field.default if isinstance(field.default, str) else f"{field.default:g}"
        assert said[1] == default, parameter.name
        compared += 1
    assert compared >= 7


def test_the_help_of_recover_gives_the_learning_rate_of_every_mode():
    help_of_rate = next(p.help for p in COMMANDS["recover"].params if p.name == "learning_rate")
    for mode in MODES:
        assert f"{RecoveryOptions(mode=mode).peak_rate():g} " in help_of_rate, mode


def test_the_help_of_prune_begins_with_the_common_options():
    panels = {p.name: getattr(p, "rich_help_panel", None) for p in COMMANDS["prune"].params}
    common = [name for name, panel in panels.items() if panel is None]
    assert common == [
        "model", "output", "preset", "method", "sparsity", "pattern", "calibration", "samples",
        "seqlen", "seed", "data_dir", "device", "memory", "overwrite", "resume", "json_file",
        "quiet",
    ]  # fmt: skip
    rest = list(dict.fromkeys(filter(None, panels.values())))
    assert rest == [
        "Calibration",
        "Method",
        "Reconstruction",
        "Allocation",
        "Advanced",
        "Preset max",
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_ends_with_two_examples_that_parse(verb):
    title, *examples = COMMANDS[verb].epilog.splitlines()
    assert title == "Examples:"
    assert len(examples) == 2
    output = call(verb, "--help").output
    for example in examples:
        assert example in [line.strip() for line in output.splitlines()], "an example is one line"
        program, name, *arguments = shlex.split(example)
        assert (program, name) == ("prunus", verb)
        # Parsing checks the names of all options, their types and choices; nothing is run.
        COMMANDS[verb].make_context(verb, arguments)


def test_shell_completion_lists_choices():
    [method] = [p for p in COMMANDS["prune"].params if p.name == "method"]
    context = typer.Context(COMMANDS["prune"])
    offered = [item.value for item in method.shell_complete(context, "wan")]
    assert offered == ["wanda", "wanda-variant"]
