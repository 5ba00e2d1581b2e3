"""Every verb with every kind of bad input: status 2, one line of error, and no file is changed."""

import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunus
from command_line import call
from tiny import tiny_checkpoint
from tiny_tokenizer import VOCABULARY, byte_tokenizer

CALIBRATED = ["--calibration", "text.txt", "--samples", "2", "--seqlen", "16"]
#: Verb -> its options in a run that would succeed.
RUNS = {
    "prune": CALIBRATED,
    "compress": ["--bits", "4", *CALIBRATED],
    "shrink": ["--blocks", "1", *CALIBRATED],
    "recover": ["--mode", "masked", "--text", "text.txt", "--seqlen", "16", "--tokens", "1024"],
}
#: The same for verbs that write no folder.
READERS = {
    "plan": CALIBRATED,
    "eval": ["--perplexity", "text.txt", "--seqlen", "16"],
    "inspect": [],
    "generate": ["--prompt", "a"],
}
#: Bad model -> what the error says.
MODELS = {
    "./gone": "neither a folder nor a hub id",
    "": "neither a folder nor a hub id|overlap",
    "text.txt": "is a file; expected the folder",
    "model.gguf": "truncated or damaged|is compressed, and recover takes",
    "fifo": "is not a folder; expected the folder",
    "empty": "no config.json",
    "damaged": "config.json is not valid JSON",
    "listed": "is no JSON object",
    "cut": "is not a whole safetensors file",
}
#: Bad output folder -> what the error says.
OUTPUTS = {
    "text.txt": "exists and is not a folder",
    "text.txt/out": "is not a folder that you may write to",
    "locked/out": "is not a folder that you may write to",
    "thesis": "holds no result of prunus .*; it is left as it is",
    "/proc/none": "cannot be created: .* is not a folder that you may write to; choose ano",
    "{model}": "overlap: choose a folder of its own",
    "{model}/out": "overlap: choose a folder of its own",
}
#: More options of a verb, or all arguments -> what the error says.
OTHERS = [
    ("prune dense out --sparsity 50", r"got 50; did you mean 0\.5\?"),
    ("plan dense --sparsity 50%", r"\(got '50%'\); did you mean 0\.5\?"),
    ("shrink dense out --blocks 25%", r"got '25%'; did you mean 0\.25\?"),
    ("prune dense out --recipe fifty.toml", r"fifty\.toml: sparsity .* did you mean 0\.5\?"),
    ("sweep sweep50.toml out", r"grid 1: sparsity .* did you mean 0\.5\?"),
    ("prune dense out --samples x", r"samples must be a whole number \(got 'x'\)"),
    ("prune dense out --seqlen 1000", "--seqlen 64 or less"),
    ("prune dense out --dtype float8", "'float8' is not one of 'auto', 'float32'"),
    ("prune dense out --pattern 50%", r"did you mean 0\.5\?"),
    ("prune dense out --method wander", "'wander' is unknown: choose one of magnitude, wanda"),
    ("prune dense out --method gone.py:mine", r"gone\.py cannot be read"),
    ("prune dense out --method broken.py:mine", r"broken\.py cannot be loaded"),
    ("prune dense out --calibration gone.txt", r"gone\.txt: no such file"),
    ("prune dense out --data gone", "the data folder does not exist"),
    ("prune dense out --recipe gone.toml", r"there is no recipe file gone\.toml"),
    ("prune dense out --resume", "no unfinished run in out to resume"),
    ("prune dense out --json empty", "--json empty is a folder"),
    ("prune dense out --json text.txt/x.json", "is not a folder that you may write to"),
    ("prune dense out --nonsense", "No such option: --nonsense"),
    ("prune dense", "Missing argument 'OUT'"),
    ("prune dense pruned --calibration text.txt", "a run with another calibration"),
    ("prune bare out --calibration text.txt", "bare has no tokenizer: copy its files"),
    ("plan bare --calibration text.txt", "bare has no tokenizer: copy its files"),
    ("plan dense text.txt/out --calibration text.txt", "is not a folder that you may write to"),
    ("eval bare --perplexity text.txt --seqlen 16", "bare has no tokenizer: copy its files"),
    ("generate bare --prompt a", "bare has no tokenizer: copy its files"),
    (
        f"compress dense out --bits 3 {' '.join(CALIBRATED)}",
        "for 3 bits name the output OUT.gguf .* --format mlx",
    ),
    (
        f"compress dense out --size 9kB {' '.join(CALIBRATED)}",
        r"take [\d.]+ kB with .* 4 bits.* For less, name the",
    ),
    ("compress dense out --bits 4 --sparsity 0.5", "No such option: --sparsity"),
    ("compress dense out --recipe fifty.toml", "it removes weights, .* use prunus prune"),
    ("compress dense out.gguf --bits 4 --format mlx", "is the format of a folder"),
    ("compress dense out", "give either --bits, such as 3, the --size of the file"),
    ("prune dense out --recipe bits.toml", "use prunus compress"),
    ("shrink dense out", "nothing is to be removed"),
    ("recover dense out", "no mode follows from it: give --mode masked"),
    ("recover pruned out --mode magic", "'magic' is not one of 'lora'"),
    ("eval dense --perplexity gone.txt", r"gone\.txt: no such file"),
    ("eval dense --reference dense --tasks rte", "--tasks alone scores none: add"),
    ("generate dense", "issing option '--prompt'"),
    ("generate dense --prompt a --top-p 90", r"did you mean 0\.9\?"),
    ("import gone.gguf out", r"gone\.gguf: no such file"),
    ("import dense out", "dense: not a file; give a file of llama.cpp"),
    ("import text.txt out", "not a GGUF file"),
    ("import model.gguf out", "truncated or damaged"),
    ("import model.gguf thesis", "the folder is not empty"),
    ("import model.gguf text.txt/out", "is not a folder that you may write to"),
    ("sweep gone.toml out", r"there is no sweep file gone\.toml"),
    ("sweep fifty.toml out", "grid is missing; unknown option 'sparsity'; known are"),
    ("sweep sweep.toml text.txt", "exists and is not a folder"),
    ("sweep sweep.toml thesis", "is not a sweep's"),
    ("sweep sweep.toml dense/out", "overlap: choose a folder of its own"),
    ("sweep sweep.toml text.txt/out", "is not a folder that you may write to"),
    ("sweep sweep.toml out --model ./gone", "neither a folder nor a hub id"),
    ("report gone", "gone is not there; give the folder of a run or a sweep"),
    ("report empty", r"empty holds neither prunus\.json \(of a run\), prunus-structure\.json"),
    ("report broken.json", "another version, or not the JSON of prunus eval"),
    ("report pruned -o text.txt/page.html", "is not a folder that you may write to"),
    ("prune dense out --sparsity half", r"sparsity must be a number \(got 'half'\)"),
    ("prune dense out --rank-timeout -3", "must be a number of seconds above 0"),
    (
        "eval dense --perplexity text.txt --rank-timeout x",
        "rank_timeout must be a number",
    ),
    ("prune dense out --sparsity 2:4", r"did you mean --pattern 2:4\?"),
    ("prune dense out --reconstruct first", "'--reconstruct': 'first' .* 'none', 'last'"),
    # Misspelt names: all that there are, and the nearest.
    ("prune dense out --preset balence", "fast, balanced, best, max; did you mean balanced\\?$"),
    ("prune dense out --method wandda", "magnitude, .* FILE.py:NAME; did you mean wanda\\?$"),
    ("prune dense out --allocation fischer", "'uniform', 'fisher'; did you mean fisher\\? \\("),
    ("prune dense out --calibration wikitext", "none of c4, .*; did you mean wikitext2\\?$"),
    ("prune dense out --recipe misspelt.toml", "known are .*; did you mean sparsity\\?$"),
    ("prune dense out --device gpu", "auto, cpu, cuda .*; did you mean cuda\\?$"),
    (
        f"compress dense out.gguf --type q4_k {' '.join(CALIBRATED)}",
        "Q4_0, .*; did you mean Q4_K\\?$",
    ),
    (
        f"compress dense out --bits 4 --format mlxx {' '.join(CALIBRATED)}",
        "be compressed-tensors or mlx; got 'mlxx'; did you mean mlx\\?$",
    ),
    ("eval dense --perplexity wikitext", "give c4, .*; did you mean wikitext2\\?$"),
    ("recover pruned out --mode lorra", "'lora', .*; did you mean lora\\? \\("),
    ("plan ./dens", "neither a folder nor a hub id; .*; did you mean the folder dense\\?$"),
    ("plan dens", "neither a local folder .*; did you mean the folder dense\\?$"),
    ("plan ./modle.gguf", "; did you mean model.gguf\\?$"),
    # Sizes.
    ("compress dense out --size 0.9", "looks like 8GB, 512MB .*; did you mean 0.9GB\\?$"),
    ("compress dense out --size 90", "looks like 8GB, 512MB .*; did you mean 90MB\\?$"),
    ("compress dense out --size 0MB", "larger than zero, such as 8GB or 512MB; got '0MB'"),
    ("prune dense out --memory 8", "a memory size looks like 8GB, .*; did you mean 8GB\\?$"),
    # What `overwrite` replaces.
    ("prune dense thesis --overwrite", "; it is left as it is. --overwrite replaces only what"),
    ("sweep sweep.toml /proc/none", "/proc/none cannot be created: "),
    ("report pruned -o /proc/none/a.md", "/proc/none/a.md cannot be created: "),
    ("inspect pruned --json /proc/none/a.json", "/proc/none/a.json cannot be created: "),
    ("import model.gguf out --dtype int8", "'int8' is not one of 'bfloat16', 'float16'"),
    ("eval dense --perplexity text.txt --seqlen 65", "model's 64 positions"),
    ("recover pruned out --mode lora --target-modules ,", "target_modules names no linear"),
    ("recover pruned out --mode masked --teacher ./gone", "neither a folder nor a hub id"),
    # What other programs call otherwise.
    ("quantize dense", "No such command 'quantize': prunus compress rounds weights"),
    ("convert dense", "No such command 'convert': prunus compress MODEL OUT.gguf writes a GGUF"),
    ("compress dense out --format gguf --bits 4", "name the output OUT.gguf, and leave --format"),
    ("compress dense x.gguf --format GGUF --bits 4", "name the output OUT.gguf, and leave --for"),
    ("compress dense out --bits four", r"bits must be a number \(got 'four'\)"),
    ("compress dense out --bits 0", "bits must be from 1 to 9, such as 4 or 4.5; got 0"),
    # The names of files for results that are folders.
    ("prune dense x.gguf", "x.gguf is the name of a .gguf file, and the result is a folder"),
    ("plan dense X.GGUF", "X.GGUF is the name of a .gguf file, and the result is a folder"),
    ("shrink dense x.gguf --blocks 1", "x.gguf .* is a folder: choose another"),
    ("recover pruned x.gguf --mode masked", "x.gguf .* the result is a folder"),
    (
        "prune dense x.gguf --preset max --seqlen 16 --minutes 1",
        "x.gguf .* the result is a folder",
    ),
    # Files that never end, or that nobody writes to.
    ("prune dense out --method fifo.py:mine", "fifo.py is a FIFO; expected a regular file"),
    ("prune dense out --recipe fifo.py", "fifo.py is a FIFO; expected a regular file"),
    ("prune dense out --method zero.py:mine", "zero.py is a character device, through the link"),
    ("report deep.json", "deep.json is not valid JSON: brackets are nested too deep"),
    ("prune nested out", "config.json is not valid JSON: brackets are nested too deep"),
    ("eval foreign --perplexity text.txt --seqlen 16", r"loaded \(brackets are nested too deep\)"),
    ("prone", "No such command 'prone'. Did you mean 'prune'?"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Checkpoints of all kinds and files that are none; no test writes to them."""
    here = tmp_path_factory.mktemp("place")
    for name in ("dense", "bare"):
        tiny_checkpoint(here / name, vocab_size=VOCABULARY, dtype=torch.bfloat16)
    byte_tokenizer().save_pretrained(here / "dense")
    prunus.prune(here / "dense", here / "pruned", "magnitude")
    for name in ("damaged", "listed", "cut"):
        shutil.copytree(here / "dense", here / name)
    (here / "damaged" / "config.json").write_text("{")
    (here / "listed" / "config.json").write_text("[]")
    shard = here / "cut" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    for name in ("empty", "locked", "thesis"):
        (here / name).mkdir()
    (here / "thesis" / "thesis.txt").write_text("years of work")
    for name in ("fifo", "fifo.py"):
        os.mkfifo(here / name)
    (here / "zero.py").symlink_to("/dev/zero")
    deep = "[" * 100_000 + "]" * 100_000
    (here / "deep.json").write_text(deep)
    for name, file in (("nested", "config.json"), ("foreign", "special_tokens_map.json")):
        shutil.copytree(here / "dense", here / name)
        (here / name / file).write_text(deep)
    (here / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    (here / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 12)
    (here / "broken.py").write_text("def mine(:\n")
    (here / "broken.json").write_text("[1, 2]")
    (here / "fifty.toml").write_text("sparsity = 50\n")
    (here / "misspelt.toml").write_text("sparsty = 0.5\n")
    (here / "bits.toml").write_text("bits = 3.0\n")
    for name, sparsity in (("sweep", 0.5), ("sweep50", 50)):
        grid = f'[[grid]]\nmethod = "magnitude"\nsparsity = [{sparsity}]\n'
        text = f'models = ["dense"]\n[scoring]\ntexts = ["text.txt"]\nseqlen = 16\n{grid}'
        (here / f"{name}.toml").write_text(text)
    return here


def cases() -> Iterator[tuple[list[str], str]]:
    for verb, options in (RUNS | READERS).items():
        out = ["out"] if verb in RUNS else []
        for model, words in MODELS.items():
            yield [verb, model, *out, *options], words
    for verb, options in RUNS.items():
        model = "pruned" if verb == "recover" else "dense"
        for output, words in OUTPUTS.items():
            yield [verb, model, output.format(model=model), *options], words
    for line, words in OTHERS:
        yield line.split(), words


CASES = [*cases()]


@pytest.mark.parametrize(("arguments", "words"), CASES, ids=[" ".join(x)[:60] for x, _ in CASES])
def test_bad_input_is_status_2_and_one_line_that_helps(arguments, words, place, monkeypatch):
    monkeypatch.chdir(place)
    access = os.access  # root may write everywhere
    monkeypatch.setattr(
        os, "access", lambda path, *a: "locked" not in str(path) and access(path, *a)
    )
    before = files(place)
    said = call(*arguments, status=2).stderr.splitlines()
    errors = [line for line in said if "error" in line]
    assert errors == said[-1:] and said[-1].startswith("prunus: error: ")
    assert re.search(words, said[-1]), said[-1]
    assert not re.search(r"\[Errno|(OS|Value|Type|Runtime)Error|Value error", said[-1]), said[-1]
    assert files(place) == before


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in found.items()}


@pytest.mark.parametrize("factor", [float("nan"), 1e30])
@pytest.mark.parametrize(
    "verb",
    [
        "prune",
        "prune --allocation fisher",
        "compress --bits 8",
        "shrink --blocks 0.5",
        "recover --mode full --held-out 1 --batch 1",
    ],
)
def test_weights_that_are_not_finite_or_too_large_name_a_linear(verb, factor, place, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(place / "dense", broken)
    tensors = load_file(broken / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] *= factor
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    name, *options = verb.split()
    given = [place / "text.txt" if each == "text.txt" else each for each in RUNS[name][-6:]]
    shown = call(name, broken, tmp_path / "out", *given, *options, status=2).stderr
    weight, reached = r"gate_proj\.weight holds weights that are", "down_proj are"
    # What measures losses looks at the size of weights before it computes.
    where = weight if math.isnan(factor) else f"(?:{reached}|{weight})"
    said = f"(?:{where} not finite|gate_proj: its weights are too large for W8A16)"
    assert re.search(rf"model\.layers\.1\.mlp\.{said}", shown), shown


def test_a_model_that_is_sparse_already_is_noted(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    for verb, name in (("prune", "pruned"), ("compress", "pruned")):
        shown = call(verb, name, tmp_path / verb, *RUNS[verb])
        assert "the model has zeros already: 50." in shown.stderr
        assert "% zeros already" in shown.stdout
    assert "already" not in call("prune", "dense", tmp_path / "out", *CALIBRATED).output


def test_a_sparsity_that_differs_from_the_one_asked_for_is_explained(place, tmp_path):
    shown = call("prune", place / "dense", tmp_path / "ties", "--method", "magnitude").stdout
    assert re.search(r"sparsity 50\.\d\d%, where 50\.00% .* threshold are removed together", shown)
    options = ["--method", "magnitude", "--group", "row"]
    shown = call("prune", place / "dense", tmp_path / "exact", *options).stdout
    assert "was asked for" not in shown
    shown = call("prune", place / "dense", tmp_path / "few", *options, "--sparsity", 0.7).stdout
    assert "where 70.00% was asked for: a share of the weights that compete is rounded" in shown


def test_token_ids_beyond_the_embedding_name_both_numbers(place, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(place / "dense", foreign)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["lazy"])
    tokenizer.save_pretrained(foreign)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox. " * 40 + "lazy " * 40)
    short = ["--seqlen", "16"]
    training = ["--mode", "full", "--tokens", "4096", "--held-out", "1", "--batch", "1", *short]
    for arguments in (
        ["generate", foreign, "--prompt", "a lazy dog"],
        ["eval", foreign, "--perplexity", text, *short],
        ["prune", foreign, tmp_path / "out", "--calibration", text, "--samples", "30", *short],
        ["recover", foreign, tmp_path / "recovered", "--text", text, *training],
    ):
        shown = call(*arguments, status=2).stderr
        assert re.search(
            rf"to {VOCABULARY}, but the model's embedding has {VOCABULARY} rows", shown
        )
