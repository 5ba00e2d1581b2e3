"""llama.cpp and prunus side by side: benchmarks/pareto.py, with stand-ins for llama.cpp."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from places import import_benchmark

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from prunus.model.checkpoint.gguf import import_gguf
from tiny_gguf import tiny_llama, write_gguf

pareto = import_benchmark("pareto")

# The stand-ins note their arguments. llama-quantize copies the file SMALL.
STAND_IN = """#!{python}
import json, shutil, sys
from pathlib import Path
here = Path(__file__).parent
with (here / "calls").open("a") as calls:
    print(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]), file=calls)
match Path(sys.argv[0]).name:
    case "llama-imatrix":
        Path(sys.argv[sys.argv.index("-o") + 1]).write_text("matrix")
    case "llama-quantize":
        shutil.copy(here / "small.gguf", sys.argv[-3])
    case "llama-bench":
        print(json.dumps([{{"avg_ts": 12.5}}]))
"""


@pytest.fixture
def given(tmp_path):
    """Arguments of a small comparison."""
    write_gguf(tiny_llama(), tmp_path / "dense.gguf")
    import_gguf(tmp_path / "dense.gguf", tmp_path / "dense")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("llama-imatrix", "llama-quantize", "llama-bench"):
        (programs / name).write_text(STAND_IN.format(python=sys.executable))
        (programs / name).chmod(0o755)
    write_gguf(tiny_llama(), programs / "small.gguf", "Q4_0")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    save_file({"input_ids": torch.randint(2, 250, (1, 200))}, tmp_path / "ids.safetensors")
    options = {
        "--gguf": tmp_path / "dense.gguf",
        "--llama-cpp": programs,
        "--calibration": tmp_path / "text.txt",
        "--text": tmp_path / "ids.safetensors",
        "--samples": 2,
        "--seqlen": 32,
        "--windows": 3,
        "--eval-seqlen": 16,
        "--threads": 1,
        "--json": tmp_path / "found.json",
    }
    fixed = [str(part) for option in options.items() for part in option]
    return [str(tmp_path / "dense"), str(tmp_path / "work"), *fixed]


def calls(tmp_path):
    return [json.loads(line) for line in (tmp_path / "bin" / "calls").read_text().splitlines()]


def test_rows_of_both_programs(given, tmp_path, capsys):
    same = f"same={tmp_path / 'dense'}"
    pareto.main([*given, "--types", "Q4_0", "--checkpoint", same, "--rounds", "0"])
    found = json.loads((tmp_path / "found.json").read_text())
    row = found["rows"]["llama.cpp Q4_0"]
    assert row["bits_per_weight"] == pytest.approx(4.5)
    assert row["types"] == {"Q4_0": 14}
    assert row["types_outside"] == {"token_embd.weight": "Q4_0", "output.weight": "Q4_0"}
    assert row["kl"] > 0
    dense = found["rows"]["prunus same"]
    assert dense["bits_per_weight"] == 16
    assert dense["kl"] == pytest.approx(0, abs=1e-9)
    assert dense["same_top"] == 1
    assert dense["perplexity"] == found["dense"]["perplexity"] == dense["reference_perplexity"]
    assert "| llama.cpp Q4_0 | 4.50 |" in capsys.readouterr().out
    assert not (tmp_path / "work" / "imported").exists()


def test_both_programs_calibrate_on_the_same_tokens(given, tmp_path):
    pareto.main([*given, "--types", "Q4_0", "--rounds", "0"])
    ids = load_file(tmp_path / "work" / "calibration.safetensors")["input_ids"]
    assert tuple(ids.shape) == (2, 32)
    text = (tmp_path / "work" / "calibration.txt").read_text()
    assert len(text) >= 2 * 32 // 2
    assert "The quick brown fox" in text or "lazy dog" in text
    matrix, quantise = calls(tmp_path)
    assert matrix[matrix.index("-c") + 1] == "32"
    assert quantise[quantise.index("--token-embedding-type") + 1] == "q8_0"
    assert quantise[quantise.index("--output-tensor-type") + 1] == "q8_0"


def test_what_is_measured_stays(given, tmp_path):
    arguments = [*given, "--types", "Q4_0"]
    pareto.main([*arguments, "--rounds", "1"])
    before = calls(tmp_path)
    assert [call[0] for call in before].count("llama-bench") == 2, "prefill, and decoding"
    pareto.main([*arguments, "--rounds", "2"])
    assert [call[0] for call in calls(tmp_path)[len(before) :]] == ["llama-bench"] * 2
    speeds = json.loads((tmp_path / "found.json").read_text())["rows"]["llama.cpp Q4_0"]["speeds"]
    assert [speed["decode"] for speed in speeds] == [12.5, 12.5]
    with pytest.raises(ValueError, match=r"was measured with scored = .*3 windows of 16 tokens"):
        pareto.main([*arguments, "--windows", "2"])


def test_a_failed_program_names_its_log(given, tmp_path):
    (tmp_path / "bin" / "llama-imatrix").write_text(f"#!{sys.executable}\nraise SystemExit(3)\n")
    with pytest.raises(RuntimeError, match=r"llama-imatrix failed, exit status 3; see .*imatrix"):
        pareto.main([*given, "--types", "Q4_0", "--rounds", "0"])
