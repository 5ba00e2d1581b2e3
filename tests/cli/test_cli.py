"""The command line: exit statuses, one-line errors, figures as JSON, Ctrl-C, safe terminals."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from safetensors.torch import save_file

import prunus
from command_line import PROGRAM, call
from processors import processor_threads
from prunus.cli import terminal
from prunus.cli.program import app
from prunus.cli.terminal import command, log, print_result
from prunus.document import Column, Document, Facts, Section, Table
from prunus.engine import linear_plan, run_facts, run_plan
from prunus.engine.progress import PREPARATION, Progress
from prunus.engine.run_options import RunOptions
from prunus.evaluation import generation
from prunus.model.checkpoint.files import holds_figures
from prunus.model.checkpoint.tensor_files import INDEX_NAME
from prunus.pruning.manifest import Manifest
from prunus.pruning.prune import Pruning
from prunus.pruning.recipe import Recipe
from prunus.reporting.console import (
    TerminalConsole,
    printable,
    progress_console,
    show_pruning,
    show_recovery,
    to_terminal,
)
from prunus.reporting.page import to_markdown
from prunus.reporting.tables import plan_facts
from prunus.training.loop import Step
from recovery_cases import training_text
from tiny import shards, tiny_checkpoint, token_ids, tree
from tiny_tokenizer import dense_checkpoint

WINDOWS = ["--samples", "4", "--seqlen", "16"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A checkpoint with a tokenizer; no test writes to it."""
    return dense_checkpoint(tmp_path_factory.mktemp("cli") / "dense")


@pytest.fixture
def text(tmp_path) -> Path:
    return training_text(tmp_path)


# --- success ---


def test_prune_writes_the_manifest_as_json(dense, text, tmp_path):
    out, report = tmp_path / "out", tmp_path / "new" / "report.json"
    result = call("prune", dense, out, "--calibration", text, *WINDOWS, "--json", report)
    assert "wanda" in result.stdout
    assert "self_attn.q_proj" in result.stdout
    lines = result.stderr.splitlines()
    expected = [
        "loading libraries",
        f"reading the configuration of {dense}",
        f"drawing calibration windows from {text}",
        "embedding 4 windows and reading block 0",
        "[1/2] model.layers.0 pruned",
        "[2/2] model.layers.1 pruned",
        f"working on what lies outside the blocks, and completing {out}",
    ]
    for line, words in zip(lines, expected, strict=True):
        assert words in line, "where there is no terminal, a line per block and per phase"
    figures = json.loads(report.read_text())
    assert figures == json.loads((out / Manifest.FILE).read_text())
    assert figures["state"] == "finished"
    assert figures["totals"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert figures["recipe"]["calibration"] == str(text)


def test_a_result_that_was_finished_earlier_does_not_look_new(dense, text, tmp_path):
    arguments = ["prune", dense, tmp_path / "out", "--calibration", text, *WINDOWS]
    assert "nothing was done" not in call(*arguments).stderr
    again = call(*arguments)
    assert "was finished by an earlier run, and nothing was done now" in again.stderr
    assert "self_attn.q_proj" in again.stdout
    arguments = ["compress", dense, tmp_path / "small", "--bits", 8]
    arguments += ["--calibration", text, *WINDOWS]
    assert "nothing was done" not in call(*arguments).stderr
    assert "nothing was done now" in call(*arguments).stderr


def test_the_command_and_the_function_give_the_same_bytes(dense, text, tmp_path):
    options = ["--method", "sparsegpt", "--pattern", "2:4"]
    options += ["--ignore", "*.q_proj", "--ignore", "*.k_proj"]
    call("prune", dense, tmp_path / "a", "--calibration", text, *WINDOWS, *options)
    prunus.prune(
        dense,
        tmp_path / "b",
        "sparsegpt",
        pattern="2:4",
        ignore=("*.q_proj", "*.k_proj"),
        calibration=str(text),
        samples=4,
        seqlen=16,
    )
    assert shards(tmp_path / "a") == shards(tmp_path / "b")


def test_flags_override_the_recipe_file(dense, text, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'method = "sparsegpt"\nsparsity = 0.25\nsamples = 4\nseqlen = 16\n'
        f"calibration = {json.dumps(str(text))}\n"
        'ignore = ["*.mlp.*"]\n'
    )
    report = tmp_path / "report.json"
    call(
        "prune", dense, tmp_path / "out", "--recipe", recipe, "--sparsity", "0.75", "--json", report
    )
    figures = json.loads(report.read_text())
    used = figures["recipe"]
    assert (used["method"], used["sparsity"], used["samples"]) == ("sparsegpt", 0.75, 4)
    assert used["ignore"] == ["*.mlp.*"]
    assert figures["totals"]["sparsity"] == pytest.approx(0.75, abs=0.01)
    # The card of the result holds the recipe, without folders. Given as a file, with the folder of
    # the text, it makes the same run.
    card = (tmp_path / "out" / "README.md").read_text()
    published = card.split("```toml\n")[1].split("```")[0]
    recipe.write_text(published.replace('"text.txt"', json.dumps(str(text))))
    again = call("prune", dense, tmp_path / "out", "--recipe", recipe)
    assert "pruned in" not in again.stderr, "the run was finished: no block is pruned again"


def test_plan_shows_what_prune_would_do_and_writes_nothing(dense, text, tmp_path):
    arguments = [dense, tmp_path / "out", "--calibration", text, *WINDOWS, "--sparsity", "0.25"]
    before = tree(tmp_path), tree(dense)
    result = call("plan", *arguments)
    assert (tree(tmp_path), tree(dense)) == before
    assert not (tmp_path / "out").exists()
    assert "memory it needs" in result.stdout and "memory it takes" in result.stdout
    call("plan", *arguments, "--json", tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    call("prune", *arguments, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert plan["linears"] == report["totals"]["linears"] == 14
    assert plan["weights"] == report["totals"]["weights"]
    assert plan["to_remove"] == report["totals"]["zeros"]
    assert (plan["dtype"], plan["batch"]) == (report["inputs"]["dtype"], report["inputs"]["batch"])
    weights = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0.9 * weights < plan["disk_bytes"] <= weights


def test_plan_tells_what_a_run_needs_from_what_it_may_use(dense, monkeypatch):
    for module in (run_facts, linear_plan, run_plan):
        monkeypatch.setattr(module, "process_memory", lambda: 0)
    recipe = Recipe(samples=6, seqlen=64, batch=1)

    def planned(memory: int) -> dict[str, Any]:
        options = RunOptions(calibration_data=token_ids(6, 64), memory=memory)
        return Pruning(dense, None, recipe, options).plan().describe()

    described = planned(10**9)
    least, most = described["least_memory_bytes"], described["peak_memory_bytes"]
    assert least < most
    assert planned(least)["peak_memory_bytes"] == planned(least)["least_memory_bytes"] == least
    assert planned(most - 1)["peak_memory_bytes"] < most
    with pytest.raises(ValueError, match="Raise `memory`"):
        planned(least - 1)
    facts = dict(plan_facts(described | {"least_memory_bytes": 10**9}).items)
    assert facts["memory it needs"] == "1.00 GB"
    assert facts["memory it takes"].startswith("at most 0.07 GB")


def test_inspect_gives_the_figures_of_the_function(dense, tmp_path):
    result = call("inspect", dense, "--json", tmp_path / "report.json")
    assert "model.layers.1.mlp.down_proj" in result.stdout
    assert "…" not in result.stdout, "a pipe has no width that names would have to be cut to"
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(
        json.dumps(prunus.inspect(dense).as_dict())
    )


@pytest.mark.parametrize("is_terminal", [False, True])
def test_steps_before_the_first_block_have_their_own_time_left(is_terminal):
    screen, seconds = io.StringIO(), 0.0
    console = Console(file=screen, width=120, force_terminal=is_terminal, get_time=lambda: seconds)
    with show_pruning("run", console) as show:
        show("measuring")
        unit = PREPARATION + "it"
        for done in range(1, 9):
            seconds += 2
            show(Progress(done, 8, "measuring", seconds, 3 * 10**9, unit, left=16.0 - seconds))
        for done in (1, 2):
            seconds += 100
            show(Progress(done, 2, f"block {done}", seconds, 3 * 10**9, left=200.0 - 100 * done))
    lines = [line.partition(" ")[2] for line in screen.getvalue().splitlines()]
    if is_terminal:
        *_, last, _ = screen.getvalue().splitlines()
        assert "2/2 blocks; left 0:00" in last
        assert "3:36" in last, "there is one clock for all phases"
        return
    # Lines that come many times a second are left out.
    assert [line.removesuffix("; peak 3.00 GB") for line in lines] == [
        "measuring", "[1/8] measuring; left 0:14",
        "[1/2] block 1; left 1:40", "[2/2] block 2; left 0:00",
    ]  # fmt: skip


# --- errors; see also test_refusals.py ---


def test_plan_refuses_what_prune_would_refuse(dense, tmp_path, monkeypatch):
    call("prune", dense, tmp_path / "out", "--method", "magnitude")
    before = tree(tmp_path)
    plan = ["plan", dense, tmp_path / "out", "--method", "magnitude"]
    assert "another sparsity (0.5, now 0.25)" in call(*plan, "--sparsity", "0.25", status=2).stderr
    call(*plan)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 1))
    for verb in ("plan", "prune"):
        *_, line = call(verb, dense, tmp_path / "b", *plan[3:], status=1).stderr.splitlines()
        assert line.startswith("prunus: error: ") and "not enough disk" in line
    assert tree(tmp_path) == before


def test_a_message_of_several_lines_is_shown_on_one(dense, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("first\nsecond")

    monkeypatch.setattr("prunus.evaluation.inspection.inspect", fail)
    assert call("inspect", dense, status=2).stderr == "prunus: error: first second\n"
    monkeypatch.setenv("PRUNUS_TRACEBACK", "1")
    result = call("inspect", dense, status=1)
    assert isinstance(result.exception, ValueError)


# --- processes of their own ---


needs_sigint = pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")


def test_after_ctrl_c_a_verb_promises_only_what_it_keeps(monkeypatch):
    def stop(_given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prunus.cli.terminal._check_json_file", stop)
    after = dict[str, str]()
    for verb, known in PROGRAM.commands.items():
        required = [each for each in known.params if each.required]
        needed = ["--prompt=x" if each.name == "prompt" else "x" for each in required]
        after[verb] = call(verb, *needed, status=130).stderr.removeprefix("prunus: stopped; ")
    resuming = {verb for verb, text in after.items() if text.startswith("finished work is kept")}
    assert resuming == {"prune", "compress", "shrink", "recover", "sweep"}
    assert all(after[verb].startswith("no work is kept") for verb in {*after} - resuming)


@needs_sigint
def test_a_run_continues_after_ctrl_c_to_the_same_bytes(tmp_path, interruptible):
    blocks = 4
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=blocks)
    # Many batches of one window: a block takes long enough to be interrupted in its middle.
    ids = token_ids(24, 16)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")

    options = ["--samples", "24", "--seqlen", "16", "--batch", "1"]
    options += ["--calibration", str(tmp_path / "ids.safetensors")]
    command = ["prune", str(dense), str(tmp_path / "out"), *options]
    with subprocess.Popen(
        [sys.executable, "-m", "prunus", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as interrupted:
        lines = iter(interrupted.stderr.readline, "")
        assert any(f"[1/{blocks}] model.layers.0 pruned" in line for line in lines)
        interrupted.send_signal(signal.SIGINT)
        _, rest = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130, rest
    assert rest.splitlines()[-1].startswith("prunus: stopped; finished work is kept")
    assert "Traceback" not in rest
    state = json.loads((tmp_path / "out" / Manifest.FILE).read_text())
    assert state["state"] == "running"
    assert 1 <= len(state["blocks"]) < blocks
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    assert not list((tmp_path / "out").glob("*.partial"))

    with processor_threads(1):
        log = call(*command).stderr
        prunus.prune(dense, tmp_path / "undisturbed", calibration=ids, batch=1)
    assert sum("taken from the earlier run" in line for line in log.splitlines()) == len(
        state["blocks"]
    )
    expected = shards(tmp_path / "undisturbed")
    assert len(expected) == blocks + 1
    assert shards(tmp_path / "out") == expected


# --- what reaches the terminal: figures are safe before they are shown, and names stay names ---

#: Clears the screen, sets a title in two ways, and turns the reading direction.
HOSTILE = "\x1b[2Jgone\x1b]0;title\x07\x9b31mred\u202ereversed"
ESCAPED = r"\x1b[2Jgone\x1b]0;title\x07\x9b31mred\u202ereversed"


@pytest.fixture(scope="module")
def oddly_named(tmp_path_factory) -> Path:
    """A checkpoint whose folder is named like a closing tag of rich; no test writes to it."""
    return dense_checkpoint(tmp_path_factory.mktemp("terminal") / "model[" / "]")


@pytest.fixture
def oddly_named_text(tmp_path) -> Path:
    (tmp_path / "text[").mkdir()
    return training_text(tmp_path).rename(tmp_path / "text[" / "].txt")


def call_unread(monkeypatch, *arguments: object) -> object:
    """Run a verb whose standard output nobody reads; return its exit status."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments])
    return ended.value.code


def test_figures_outlive_the_reader_of_the_output(
    oddly_named, oddly_named_text, tmp_path, monkeypatch
):
    windows = ["--calibration", oddly_named_text, "--samples", 2, "--seqlen", 16]
    verbs = {
        "inspect": ["inspect", oddly_named],
        "eval": ["eval", oddly_named, "--perplexity", oddly_named_text, "--seqlen", 16],
        "prune": ["prune", oddly_named, tmp_path / "pruned[/]", *windows],
        "plan": ["plan", oddly_named, *windows],
        "generate": ["generate", oddly_named, "--prompt", "a", "--max-new-tokens", 3],
        "compress": [
            *("compress", oddly_named, tmp_path / "small[/]", "--bits", 8),
            *windows,
        ],
    }
    for name, arguments in verbs.items():
        file = tmp_path / f"{name}.json"
        assert call_unread(monkeypatch, *arguments, "--json", file) == 0, name
        assert holds_figures(file), f"{name} would not replace its figures"


def test_generation_without_a_reader_stops(oddly_named, monkeypatch):
    pieces = []

    def endless(*_args, **_options):
        while True:
            pieces.append("a")
            yield "a"

    monkeypatch.setattr(generation, "generate", endless)
    assert call_unread(monkeypatch, "generate", oddly_named, "--prompt", "a") == 0
    assert len(pieces) == 1


def test_names_in_brackets_are_not_markup(oddly_named, oddly_named_text, tmp_path):
    arguments = ["eval", oddly_named, "--perplexity", oddly_named_text, "--seqlen", 16]
    assert "text[/].txt" in call(*arguments).stdout
    assert "model[/]" in call("inspect", oddly_named).stdout


def test_a_table_is_shown_although_json_cannot_be_written(tmp_path, capsys):
    table = Table("t", (Column("figure", ".1f"),), ((1.5,),))
    verb = command(lambda: print_result({"figure": float("nan")}, table), {})
    with pytest.raises(typer.Exit):
        verb(json_file=tmp_path / "figures.json")
    shown = capsys.readouterr()
    assert "1.5" in shown.out
    assert "not JSON compliant" in shown.err


def test_control_characters_are_escaped_in_all_that_is_shown(capsys):
    table = RichTable(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    columns = (Column(HOSTILE),)
    parts = (Facts(HOSTILE, ((HOSTILE, HOSTILE),)), Table(HOSTILE, columns, ((HOSTILE,),)))
    document = Document(HOSTILE, (Section(HOSTILE, HOSTILE, parts=parts),))
    output = io.StringIO()
    console = TerminalConsole(file=output, width=160)
    console.print(table, HOSTILE, to_terminal(document))
    assert output.getvalue().count(ESCAPED) == 13
    log(HOSTILE)
    shown = output.getvalue() + to_markdown(document) + capsys.readouterr().err
    assert not {letter for letter in shown if letter != "\n" and printable(letter) != letter}


def test_generated_text_and_error_messages_cannot_command_the_terminal(oddly_named, monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda *_, **__: iter(["a\r\n", HOSTILE]))
    assert call("generate", oddly_named, "--prompt", "a").stdout == f"a\n{ESCAPED}\n"
    missing = call("inspect", f"no/such/{HOSTILE}", status=2)
    assert ESCAPED in missing.stderr
    assert "\x1b" not in missing.stderr


def test_a_terminal_keeps_the_colours_of_rich():
    output = io.StringIO()
    TerminalConsole(file=output, force_terminal=True, width=80).print(Text("bold", style="bold"))
    assert output.getvalue() == "\x1b[1mbold\x1b[0m\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_takes_any_name_and_goes_on_without_a_reader(is_terminal, monkeypatch):
    title = f"wanda model[/] {HOSTILE}"
    step = Progress(1, 2, "block[/]", 1.0, 10**9)
    tokens = Step(0.5, 10, 1.0, "step[/]", loss=2.0, perplexity=3.0)
    output = io.StringIO()
    console = TerminalConsole(file=output, force_terminal=is_terminal, width=200)
    for show, one in ((show_pruning, step), (show_recovery, tokens)):
        with show(title, console) as progress:
            progress(one)
    assert "[/]" in output.getvalue()
    assert "\x1b[2J" not in output.getvalue()

    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        log("nobody reads this")
        for show, one in ((show_pruning, step), (show_recovery, tokens)):
            console = progress_console()
            console._force_terminal = is_terminal
            with show(title, console) as progress:
                progress(one)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def test_names_of_files_that_are_not_utf8_can_be_shown_and_written(tmp_path, capsys):
    table = Table("t", (Column("caf\udce9"),), ())
    verb = command(lambda: print_result({"model": "caf\udce9"}, table), {})
    verb(json_file=tmp_path / "figures.json")
    assert r"caf\udce9" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text()) == {"model": "caf\udce9"}


def test_a_dash_for_json_is_standard_output(oddly_named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("inspect", oddly_named, "--json", "-")
    assert json.loads(result.stdout)["blocks"] == 2
    assert "zeros" in result.stderr, "the table goes to standard error"
    assert not list(tmp_path.iterdir())


def test_a_warning_of_prunus_is_one_line(capsys):
    with terminal.user_errors("unused"):
        warnings.simplefilter("always")
        warnings.warn_explicit("mix: give `data`", RuntimeWarning, terminal.__file__, 1)
    assert capsys.readouterr().err == "prunus: warning: mix: give --data\n"
