"""`prunus recover` on the command line: figures, progress, one-line errors."""

import io
import json

import torch
from rich.console import Console

from command_line import call
from prunus.model.loading import load_model
from prunus.recovery.record import RecoveryRecord
from prunus.recovery.training import Step
from prunus.reporting.console import show_recovery

SHORT = ["--tokens", "320", "--seqlen", "16", "--batch", "1", "--held-out", "2"]
SHORT += ["--learning-rate", "0.01"]


def test_recover_shows_its_figures_and_writes_them_as_json(dense, pruned, text, tmp_path):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    result = call(
        "recover", pruned, out, "--text", text, *SHORT,
        "--teacher", dense, "--evaluations", 2, "--json", figures,
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
    out = tmp_path / "lora"
    lora = ("--mode", "lora", "--target-modules", "k_proj, q_proj")
    result = call("recover", pruned, out, "--text", text, *SHORT, *lora)
    assert "parameters added" in " ".join(result.stdout.split())
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "q_proj"]


def test_a_recovery_that_won_nothing_says_so(pruned, text, tmp_path):
    out = tmp_path / "out"
    absurd = [*SHORT, "--learning-rate", "1"]
    result = call("recover", pruned, out, "--mode", "masked", "--text", text, *absurd)
    assert "no evaluation was better than the start" in " ".join(result.stdout.split())
    weights = load_model(pruned).state_dict()
    assert all(torch.equal(weights[name], x) for name, x in load_model(out).state_dict().items())


def test_a_terminal_shows_every_step_and_plain_lines_show_measurements():
    shown = {}
    for is_terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120)
        with show_recovery("masked out", console) as progress:
            for step in range(50):
                progress(Step(step / 50, step, 0.0, f"loss {step}", loss=float(step)))
            progress(Step(0.75, 50, 0.0, "held-out perplexity 3.000", loss=1.0, perplexity=3.0))
        shown[is_terminal] = console.file.getvalue()
    assert "75%" in shown[True] and "held-out perplexity 3.000" in shown[True]
    lines = shown[False].splitlines()
    assert len(lines) == 2 and "held-out perplexity 3.000" in lines[1]
