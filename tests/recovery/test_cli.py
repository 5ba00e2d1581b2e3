"""`prunus recover` on the command line: figures, progress, one-line errors."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from transformers.utils import logging

from command_line import call
from prunus.model.loading import load_model
from prunus.recovery.record import RecoveryRecord
from prunus.recovery.training import Step
from prunus.reporting.progress import show_recovery
from recovery_cases import dense_checkpoint, pruned_checkpoint, training_text

SHORT = [
    "--tokens",
    "320",
    "--seqlen",
    "16",
    "--batch",
    "1",
    "--held-out",
    "2",
    "--learning-rate",
    "0.01",
]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return pruned_checkpoint(folder / "pruned", dense_checkpoint(folder / "dense"), pattern="2:4")


@pytest.fixture(scope="module")
def text(pruned):
    return training_text(pruned.parent)


@pytest.fixture(autouse=True)
def _transformers_speaks_again_afterwards():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


def test_recover_shows_its_figures_and_writes_them_as_json(pruned, text, tmp_path):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    result = call(
        "recover", pruned, out, "--mode", "masked", "--text", text, *SHORT,
        "--teacher", pruned.parent / "dense", "--evaluations", 2, "--json", figures,
    )  # fmt: skip
    assert "the result" in result.stdout
    shown = " ".join(result.stdout.split())  # the lines below a table are wrapped to its width
    assert "compared weight by weight" in shown
    record = json.loads(figures.read_text())
    assert record == json.loads((out / RecoveryRecord.FILE).read_text())
    assert f"{record['totals']['zeros']:,} of {record['totals']['weights']:,}" in shown
    lines = [line for line in result.stderr.splitlines() if "held-out perplexity" in line]
    assert len(lines) == 3, "before, half way and at the end"
    assert "100% 320 tokens" in lines[2]
    call("inspect", out)


def test_lora_shows_the_parameters_it_adds(pruned, text, tmp_path):
    result = call(
        "recover",
        pruned,
        tmp_path / "lora",
        "--mode",
        "lora",
        "--text",
        text,
        *SHORT,
        "--target-modules",
        "q_proj",
    )
    assert "parameters added" in " ".join(result.stdout.split())
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())[
        "target_modules"
    ] == ["q_proj"]


def test_a_recovery_that_won_nothing_says_so(pruned, text, tmp_path):
    out = tmp_path / "out"
    absurd = [*SHORT, "--learning-rate", "1", "--patience", "1"]
    result = call("recover", pruned, out, "--mode", "masked", "--text", text, *absurd)
    assert "no evaluation was better than the start" in " ".join(result.stdout.split())
    weights = load_model(pruned).state_dict()
    assert all(torch.equal(weights[name], x) for name, x in load_model(out).state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode", "masked", "--minutes", "1"], "in tokens or in minutes"),
        (["--mode", "lora", "--target-modules", ","], "target_modules names no linear"),
        (["--mode", "masked", "--teacher", "./nowhere"], "neither a folder nor a hub id"),
    ],
)
def test_errors_are_one_line(arguments, words, pruned, text, tmp_path):
    result = call("recover", pruned, tmp_path / "out", "--text", text, *SHORT, *arguments, status=2)
    assert result.stderr.startswith("prunus: error:")
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_bar_of_a_terminal_shows_share_loss_and_perplexity():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with show_recovery("masked out", console) as progress:
        progress(Step(0.25, 1024, 1.0, "loss 2.000", loss=2.0))
        progress(Step(0.5, 2048, 2.0, "held-out perplexity 7.500", loss=1.5, perplexity=7.5))
        progress(Step(0.75, 3072, 3.0, "loss 1.250", loss=1.25))
    shown = console.file.getvalue()
    assert "75%" in shown
    assert "loss 1.250" in shown
    assert "held-out perplexity 7.500" in shown


def test_plain_lines_show_steps_seldom_and_measurements_always():
    console = Console(file=io.StringIO(), force_terminal=False, width=120)
    with show_recovery("masked out", console) as progress:
        for step in range(50):
            progress(Step(step / 50, step, 0.0, f"loss {step}", loss=float(step)))
        progress(Step(1.0, 50, 0.0, "held-out perplexity 3.000", loss=1.0, perplexity=3.0))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2
    assert "held-out perplexity 3.000" in lines[1]
