"""What reaches the terminal: figures are safe before they are shown, and names stay names."""

import io
import json
import os
import warnings
from pathlib import Path

import pytest
import typer
from rich.table import Table as RichTable
from rich.text import Text

from command_line import call
from prunus.cli import app, terminal
from prunus.cli.terminal import command, log, print_result
from prunus.engine.document import Column, Document, Facts, Section, Table
from prunus.engine.progress import Progress
from prunus.evaluation import generation
from prunus.recovery.training import Step
from prunus.reporting.console import (
    TerminalConsole,
    printable,
    progress_console,
    show_pruning,
    show_recovery,
    to_terminal,
)
from prunus.reporting.page import to_markdown
from tiny_tokenizer import dense_checkpoint

#: Clears the screen, sets a title in two ways, and turns the reading direction.
HOSTILE = "\x1b[2Jgone\x1b]0;title\x07\x9b31mred\u202ereversed"
ESCAPED = r"\x1b[2Jgone\x1b]0;title\x07\x9b31mred\u202ereversed"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A checkpoint whose folder is named like a closing tag of rich; no test writes to it."""
    return dense_checkpoint(tmp_path_factory.mktemp("terminal") / "model[" / "]")


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text[" / "].txt"
    path.parent.mkdir()
    path.write_text("The quick brown fox jumps over the lazy dog. " * 12)
    return path


def call_unread(monkeypatch, *arguments: object) -> object:
    """Run a verb whose standard output nobody reads; return its exit status."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments])
    return ended.value.code


def test_figures_outlive_the_reader_of_the_output(dense, text, tmp_path, monkeypatch):
    windows = ["--samples", 2, "--seqlen", 16]
    verbs = {
        "inspect": ["inspect", dense],
        "eval": ["eval", dense, "--perplexity", text, "--seqlen", 16],
        "prune": ["prune", dense, tmp_path / "pruned[/]", "--calibration", text, *windows],
        "plan": ["plan", dense, "--calibration", text, *windows],
        "generate": ["generate", dense, "--prompt", "a", "--max-new-tokens", 3],
        "compress": [
            *("compress", dense, tmp_path / "small[/]", "--bits", 8),
            *("--calibration", text, *windows),
        ],
    }
    for name, arguments in verbs.items():
        file = tmp_path / f"{name}.json"
        assert call_unread(monkeypatch, *arguments, "--json", file) == 0, name
        assert json.loads(file.read_text()), name


def test_generation_without_a_reader_stops(dense, monkeypatch):
    pieces = []

    def endless(*_args, **_options):
        while True:
            pieces.append("a")
            yield "a"

    monkeypatch.setattr(generation, "generate", endless)
    assert call_unread(monkeypatch, "generate", dense, "--prompt", "a") == 0
    assert len(pieces) == 1


def test_names_in_brackets_are_not_markup(dense, text, tmp_path):
    arguments = ["eval", dense, "--perplexity", text, "--seqlen", 16]
    assert "text[/].txt" in call(*arguments).stdout
    assert "model[/]" in call("inspect", dense).stdout


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


def test_generated_text_and_error_messages_cannot_command_the_terminal(dense, monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda *_, **__: iter(["a\r\n", HOSTILE]))
    assert call("generate", dense, "--prompt", "a").stdout == f"a\n{ESCAPED}\n"
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


def test_a_dash_for_json_is_standard_output(dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("inspect", dense, "--json", "-")
    assert json.loads(result.stdout)["blocks"] == 2
    assert "zeros" in result.stderr, "the table goes to standard error"
    assert not list(tmp_path.iterdir())


def test_a_warning_of_prunus_is_one_line(capsys):
    with terminal.user_errors("unused"):
        warnings.simplefilter("always")
        warnings.warn_explicit("mix: give `data`", RuntimeWarning, terminal.__file__, 1)
    assert capsys.readouterr().err == "prunus: warning: mix: give --data\n"
