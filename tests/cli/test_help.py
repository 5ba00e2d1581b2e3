"""The help of every verb: quick, in panels, with examples that can be copied; and TAB in shells."""

import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
from pydantic_core import PydanticUndefined

import prunus
from command_line import PROGRAM, call
from prunus.engine.run_options import RunOptions
from prunus.pruning.recipe import Recipe
from prunus.recovery.recovery_options import Mode, RecoveryOptions
from prunus.rounding.compression_recipe import CompressionRecipe
from prunus.structure.structure_record import StructureRecipe

VERBS = [
    "prune", "compress", "shrink", "recover", "plan", "eval", "inspect", "sweep", "report",
    "generate", "import",
]  # fmt: skip
COMMANDS = PROGRAM.commands


def test_help_lists_the_verbs_in_panels_with_one_line_each():
    assert list(COMMANDS) == VERBS
    output = call("--help").output
    panels = ["Make a model smaller", "Measure and compare models", "Use a model, or store it in"]
    positions = [output.index(f"─ {panel}") for panel in panels]
    assert positions == sorted(positions)
    verbs = output[positions[0] :].splitlines()
    lines = [line for line in verbs if line.startswith("│")]
    assert [line.split()[1] for line in lines] == VERBS, "a verb's line must not be wrapped"


def test_without_a_verb_the_help_ends_with_three_examples_that_parse():
    output = call(status=2).output
    assert output.strip() == call("--help").output.strip() and "Usage: " in output
    title, *examples = [line.strip() for line in output[output.index("Examples:") :].splitlines()]
    examples = [example for example in examples if example]
    assert len(examples) == 3, title
    for example in examples:
        _, name, *arguments = shlex.split(example)
        COMMANDS[name].make_context(name, arguments)


def lines_of_help(verb: str, flag: str, columns: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        return call(verb, flag).output.strip().splitlines()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("columns", [80, 100])
def test_the_help_of_a_verb_fits_a_screen_and_help_all_shows_every_option(verb, columns):
    short = lines_of_help(verb, "--help", columns)
    assert len(short) <= 50
    options = [p for p in COMMANDS[verb].params if p.param_type_name == "option" and not p.hidden]
    shown = set(re.findall(r"│[ *]+(--[a-z-]+)", "\n".join(short)))
    hint = re.search(rf"prunus {verb} --help-all shows (\d+) more options", "\n".join(short))
    assert sum(p.opts[0] not in shown for p in options) == (int(hint[1]) if hint else 0)
    everything = "\n".join(lines_of_help(verb, "--help-all", columns))
    assert {p.opts[0] for p in options} <= set(re.findall(r"│[ *]+(--[a-z-]+)", everything))
    assert "--help-all" not in everything


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("compress", ["--template", "--rounding", "--fast-on"]),
        ("plan", ["--template", "--rounding", "--fast-on", "--fits", "--context"]),
    ],
)
def test_the_short_help_has_the_options_of_gguf_files(verb, options):
    short = "\n".join(lines_of_help(verb, "--help", 80))
    assert all(re.search(rf"│[ *]+{option} ", short) for option in options)
    for words in ("GGUF", "MLX", "vLLM") if verb == "compress" else ():
        assert words in short.partition("Arguments")[0]


def test_other_programs_names_of_an_option_are_taken():
    for name in ("--max-new-tokens", "--max-tokens", "-n"):
        arguments = ["dense", "--prompt", "a", name, "3"]
        given = COMMANDS["generate"].make_context("generate", arguments).params
        assert given["max_new_tokens"] == "3"


def test_help_of_every_verb_is_quick():
    """In a process of its own: torch takes seconds to import, and no help needs it."""
    script = f"""
import sys
from typer.testing import CliRunner
from prunus.cli.program import app
import prunus.cli.flags, prunus.cli.terminal
for verb in {[[], *[[verb] for verb in VERBS]]}:
    for flag in ("--help", "-h") if verb in ([], ["prune"]) else ["--help"]:
        result = CliRunner().invoke(app, [*verb, flag])
        assert result.exit_code == 0, result.output
        assert "Usage: " in result.output and " ".join(verb) in result.output
slow = {{"torch", "transformers", "numpy", "datasets"}} & set(sys.modules)
assert not slow, slow
import prunus
assert prunus.Recipe().sparsity == 0.5
assert not {{"torch", "transformers"}} & set(sys.modules), "a recipe knows nothing of torch"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize(
    ("verb", "models"),
    [
        ("prune", (Recipe, RunOptions)),
        ("compress", (CompressionRecipe, RunOptions)),
        ("recover", (RecoveryOptions,)),
        ("shrink", (StructureRecipe,)),
    ],
)
def test_every_declared_option_is_in_the_help_with_its_default(verb, models):
    helps = {parameter.name: parameter.help for parameter in COMMANDS[verb].params}
    for model in models:
        for name, option in model.declared().items():
            assert (name in helps) == option.flag or name == "memory", name
            if option.flag and name in helps:
                assert helps[name].startswith(option.help), name
                assert "Undefined" not in helps[name], name
                default = model.model_fields[name].get_default(call_default_factory=True)
                if option.default is None and default not in (
                    None,
                    False,
                    (),
                    {},
                    PydanticUndefined,
                ):
                    shown = f"{default:g}" if isinstance(default, float) else str(default)
                    assert f"Default: {shown}." in helps[name], name


def test_the_help_of_recover_gives_the_learning_rate_of_every_mode():
    help_of_rate = next(p.help for p in COMMANDS["recover"].params if p.name == "learning_rate")
    for mode in get_args(Mode):
        assert f"{RecoveryOptions(mode=mode).peak_rate():g} " in help_of_rate, mode


def test_the_help_of_prune_begins_with_the_common_options():
    panels = {p.name: getattr(p, "rich_help_panel", None) for p in COMMANDS["prune"].params}
    common = [name for name, panel in panels.items() if panel is None]
    assert common[:6] == ["model", "output", "preset", "method", "sparsity", "pattern"]
    assert {"calibration", "samples", "seqlen", "device", "memory", "data"} <= set(common)
    assert {"overwrite", "json_file", "quiet"} <= set(common)
    assert {"Calibration", "Method", "Reconstruction", "Advanced"} <= set(panels.values())


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


# --- completion ---

#: What is typed before TAB -> the line after it. Each has one completion.
LINES = {
    "prunus reco": "prunus recover ",
    "prunus prune --reconstruct-": "prunus prune --reconstruct-epochs ",
    "prunus prune dense out --method magn": "prunus prune dense out --method magnitude ",
    "prunus compress dense out.gguf --type IQ3_X": "prunus compress dense out.gguf --type IQ3_XXS ",
    "prunus inspect dense-": "prunus inspect dense-folder/",
}
READY = "ready> "
SKIP_BASH = sys.platform == "darwin"  # its bash is older than 4.4


@pytest.fixture(params=["bash", "zsh", "fish"])
def shell(request, tmp_path, monkeypatch) -> str:
    """A shell whose home has a program and its completion, and the folder `dense-folder`."""
    name = request.param
    if os.name != "posix" or shutil.which(name) is None or (name == "bash" and SKIP_BASH):
        pytest.skip(f"the shell {name} is not installed, or an old bash of macOS")
    program = tmp_path / "bin" / "prunus"
    program.parent.mkdir()
    source = Path(prunus.__file__).parents[1]
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(source)!r})\n"
        "from prunus.cli.program import main\nmain()\n"
    )
    program.chmod(0o755)
    (tmp_path / "dense-folder").mkdir()
    for startup in (".bashrc", ".zshrc"):
        (tmp_path / startup).write_text(f"PS1='{READY}'\n")
    path = f"{program.parent}:{os.environ['PATH']}"
    home = str(tmp_path)
    for variable, value in {"HOME": home, "ZDOTDIR": home, "PATH": path, "TERM": "dumb"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    # A shell becomes the program where it is the last command, and is not found then.
    command = [name, "-ic", "prunus --install-completion; true"]
    subprocess.run(command, check=True, timeout=120, stdin=subprocess.DEVNULL, capture_output=True)
    return name


def test_tab_completes_verbs_options_choices_and_files(shell):
    for typed, expected in LINES.items():
        if shell == "fish":
            command = ["fish", "-c", "complete -C $argv[1]", typed]
            offered = subprocess.check_output(command, text=True, timeout=120).splitlines()
            words = [line.partition("\t")[0] for line in offered]
            assert words == [expected.split()[-1]], offered
        else:
            assert expected in press_tab(shell, typed, expected)


def press_tab(shell: str, typed: str, expected: str) -> str:
    """What a terminal shows when `typed` and TAB are pressed in a new shell."""
    import pty

    process, terminal = pty.fork()
    if process == 0:
        os.execlp(shell, shell, "-i")
    # What is typed, and what the terminal shows before. The first TAB of a new zsh loads the
    # completion and rings the bell; the next one completes.
    keys = [(READY, f"{typed}\t")] + ([("\a", "\t")] if shell == "zsh" else [])
    shown, deadline = "", time.monotonic() + 60
    try:
        while time.monotonic() < deadline and expected not in shown.replace("\a", ""):
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
            if keys and keys[0][0] in shown:
                os.write(terminal, keys.pop(0)[1].encode())
                shown = shown.replace("\a", "")
    finally:
        os.close(terminal)
        os.waitpid(process, 0)
    return shown.replace("\a", "")
