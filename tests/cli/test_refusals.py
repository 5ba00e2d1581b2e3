"""Every verb with every kind of bad input: status 2, one line of error, and no file is changed.

Then damaged checkpoints and numbers that are not finite: the message says what is wrong.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import prunus
from changes import edit_json, edit_tensors
from command_line import call
from prunus.engine.run_record import shard_name
from prunus.model.checkpoint.tensor_files import INDEX_NAME
from prunus.pruning.manifest import Manifest
from refusals import assert_refused
from tiny import shards, tiny_checkpoint, tiny_model, token_ids, tree
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
    ("sweep sweep25.toml out", "^prunus: error: cell dense-magnitude-2of5: "),
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
    ("prune dense out --masks pruned --sparsity-of *=0.5", "drop --sparsity-of$"),
    ("compress dense out.gguf --size 1kB", "has [0-9,]+ weights, so that is 0.* bits for each"),
    ("prune dense out --resume", "no unfinished run in out to resume"),
    ("prune dense out --json empty", "--json empty is a folder"),
    ("prune dense out --json text.txt/x.json", "is not a folder that you may write to"),
    ("inspect dense --json broken.json", "broken.json exists and was not written by this command"),
    ("inspect dense --json dense/config.json", "config.json exists and was not written by this"),
    ("report empty.json --json ./empty.json", "empty.json is named twice in this command"),
    ("compress dense new.gguf --bits 4 --json new.gguf", "new.gguf is named twice in this"),
    ("report pruned -o notes.md", "notes.md exists and was not written by this command"),
    ("report pruned -o notes.csv", "notes.csv exists and was not written by this command"),
    ("plan dense out --fits 8GB", "a name that ends in .gguf"),
    (f"prune dense {'n' * 300}", "a name has at most 255 bytes, and n* has 300"),
    (f"compress dense {'n' * 300} --bits 4", "a name has at most 255 bytes, and n* has 300"),
    (f"inspect dense --json {'n' * 300}", "at most 255 bytes"),
    ("prune dense out --nonsense", "No such option: --nonsense"),
    ("prune dense", "Missing argument 'OUT'"),
    ("prune dense pruned --seqlen 16 --calibration text.txt", "a run with another calibration"),
    ("prune bare out --calibration text.txt", "bare has no tokenizer: copy its files"),
    ("plan bare --calibration text.txt", "bare has no tokenizer: copy its files"),
    ("plan dense text.txt/out --calibration text.txt", "is not a folder that you may write to"),
    ("eval bare --perplexity text.txt --seqlen 16", "bare has no tokenizer: copy its files"),
    ("generate bare --prompt a", "bare has no tokenizer: copy its files"),
    (
        f"compress dense out --bits 2 {' '.join(CALIBRATED)}",
        "2 bits is not possible in a compressed-tensors folder of this model: its types take 2",
    ),
    (
        f"compress dense out --size 9kB {' '.join(CALIBRATED)}",
        r"9\.0 kB is not possible in .* per weight, and such files [\d.]+ kB to",
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
    ("import model.gguf thesis", "the GGUF file is truncated or damaged"),
    ("import model.gguf text.txt/out", "is not a folder that you may write to"),
    ("sweep gone.toml out", r"there is no sweep file gone\.toml"),
    ("sweep fifty.toml out", "grid is missing; unknown option 'sparsity'; known are"),
    ("sweep sweep.toml text.txt", "exists and is not a folder"),
    ("sweep sweep.toml thesis", r"no result of prunus sweep \(thesis\.txt\); it is left"),
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
    ("prune dense out --preset balence", "fast, balanced, best; did you mean balanced\\?$"),
    ("prune dense out --method wandda", "magnitude, .* FILE.py:NAME; did you mean wanda\\?$"),
    ("prune dense out --allocation fischer", "uniform, fisher, owl, .*; did you mean fisher\\?$"),
    ("prune dense out --calibration wikitext", "none of c4, .*; did you mean wikitext2\\?$"),
    ("prune dense out --recipe misspelt.toml", "unknown option '.*'; did you mean sparsity\\?$"),
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
    (
        "prune dense thesis --seqlen 16 --overwrite",
        "; it is left as it is. --overwrite replaces only what",
    ),
    ("prune dense text.txt --seqlen 16 --overwrite", "exists and is not a folder"),
    ("prune dense dense --overwrite", "overlap: choose a folder of its own"),
    ("prune dense dense/deep/out", "overlap: choose a folder of its own"),
    ("prune dense thesis/../dense --overwrite", "overlap: choose a folder of its own"),
    ("prune dense .", "overlap: choose a folder of its own"),
    ("sweep sweep.toml /proc/none", "/proc/none cannot be created: "),
    ("report pruned -o /proc/none/a.md", "/proc/none/a.md cannot be created: "),
    ("inspect pruned --json /proc/none/a.json", "/proc/none/a.json cannot be created: "),
    ("import model.gguf out --dtype int8", "'int8' is not one of 'bfloat16', 'float16'"),
    ("eval dense --perplexity text.txt --seqlen 65", "the model has 64 positions"),
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
    # Files that never end, or that nobody writes to.
    ("prune dense out --method fifo.py:mine", "fifo.py is a FIFO; expected a regular file"),
    ("prune dense out --recipe fifo.py", "fifo.py is a FIFO; expected a regular file"),
    ("prune dense out --method zero.py:mine", "zero.py is a character device, through the link"),
    ("report deep.json", "deep.json is not valid JSON: brackets are nested too deep"),
    ("prune nested out", "config.json is not valid JSON: brackets are nested too deep"),
    ("eval foreign --perplexity text.txt --seqlen 16", r"loaded \(brackets are nested too deep\)"),
    ("prone", "No such command 'prone'. Did you mean 'prune'?"),
]


_SWEEP = """models = ["dense"]
[scoring]
texts = ["text.txt"]
seqlen = 16
[[grid]]
method = "magnitude"
sparsity = [{}]
"""
#: Name of a file in the place of the tests -> its text.
FILES = {
    "text.txt": "The quick brown fox jumps over the lazy dog. " * 12,
    "model.gguf": "GGUF" + "\0" * 60,
    "broken.py": "def mine(:\n",
    "broken.json": "[1, 2]",
    "empty.json": "",
    "notes.md": "years of work",
    "notes.csv": "when,what\n1,2\n",
    "deep.json": "[" * 100_000 + "]" * 100_000,
    "fifty.toml": "sparsity = 50\n",
    "misspelt.toml": "sparsty = 0.5\n",
    "bits.toml": "bits = 3.0\n",
    "sweep.toml": _SWEEP.format(0.5),
    "sweep25.toml": _SWEEP.format("'2:5'"),
    "sweep50.toml": _SWEEP.format(50),
    "damaged/config.json": "{",
    "listed/config.json": "[]",
    "thesis/thesis.txt": "years of work",
}


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
    shard = here / "cut" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    for name in ("empty", "locked", "thesis"):
        (here / name).mkdir()
    for name in ("fifo", "fifo.py"):
        os.mkfifo(here / name)
    (here / "zero.py").symlink_to("/dev/zero")
    for name, file in (("nested", "config.json"), ("foreign", "special_tokens_map.json")):
        shutil.copytree(here / "dense", here / name)
        (here / name / file).write_text(FILES["deep.json"])
    for name, text in FILES.items():
        (here / name).write_text(text)
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
    for name in ("gate_proj", "up_proj"):
        edit_tensors(broken, lambda x: x[f"model.layers.1.mlp.{name}.weight"].mul_(factor))  # noqa: B023
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


# --- files and numbers that are damaged ---

#: Weights outside the blocks.
OUTSIDE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
PICKLE = b"\x80\x04K\x01."


@pytest.fixture
def refused(tmp_path):
    """Checks that `prune` raises, and that everything below `tmp_path` stays as it was."""

    def check(kind: type[Exception], message: str, model: Any, out: str = "out", **options) -> None:
        before = tree(tmp_path)
        with pytest.raises(kind, match=message):
            prunus.prune(model, tmp_path / out, **{"calibration": token_ids(), **options})
        assert tree(tmp_path) == before

    return check


@pytest.fixture(scope="module")
def master(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("master") / "dense", vocab_size=VOCABULARY)


@pytest.fixture
def dense(master, tmp_path) -> Path:
    """A checkpoint of one file, without a tokenizer, alone in `tmp_path`."""
    return Path(shutil.copytree(master, tmp_path / "dense"))


@pytest.fixture
def sharded(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    assert len(list((tmp_path / "dense").glob("model-*-of-00003.safetensors"))) == 3
    return tmp_path / "dense"


# --- the checkpoint ---


def test_shards_that_are_missing_cut_off_or_elsewhere(sharded, tmp_path, refused):
    shard, index = sharded / "model-00002-of-00003.safetensors", sharded / INDEX_NAME
    whole, places = shard.read_bytes(), json.loads(index.read_text())["weight_map"]
    shard.unlink()
    refused(FileNotFoundError, r"shard model-00002-of-00003\.safetensors is missing", sharded)
    for keep in (0, 5, 200, -1):
        shard.write_bytes(whole[:keep])
        refused(ValueError, r"model-00002-of-00003\.safetensors \([\d,]+ bytes\) is not a", sharded)
    shard.write_bytes(whole)
    name = next(iter(places))
    # The file exists and is whole, so only its name can be the reason.
    (sharded / "sub").mkdir()
    for folder in (tmp_path, sharded / "sub"):
        shutil.copy(sharded / "model-00001-of-00003.safetensors", folder / "x.safetensors")
    for place in ("../", f"{tmp_path}/", "..\\", "sub/", ".."):
        place += "" if place == ".." else "x.safetensors"
        edit_json(index, weight_map=places | {name: place})
        refused(ValueError, f"places '{name}' in .*shards must be plain file names", sharded)
    (sharded / "weights.bin").write_bytes(PICKLE)
    edit_json(index, weight_map=dict.fromkeys(places, "weights.bin"))
    refused(ValueError, r"'weights\.bin': shards must be .*ending in \.safetensors", sharded)
    wrong = {"model.norm.weight": "model-00001-of-00003.safetensors"}
    assert places["model.norm.weight"] != wrong["model.norm.weight"]
    edit_json(index, weight_map=places | wrong)
    refused(ValueError, r"'model\.norm\.weight' is in .*does not hold it.*belong together", sharded)
    for content in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'):
        index.write_text(content)
        refused(ValueError, rf"{INDEX_NAME} (is not valid JSON|has no 'weight_map')", sharded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nonsense"}, "describes no model that transformers .* knows: .*`nonsense`"),
        ({"model_type": None, "architectures": None}, "describes no model that .* knows"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "no tensor is stored so: "),
        ({"num_hidden_layers": 3}, r"no weight for model\.layers\.2\..*is the checkpoint whole"),
        ({"num_hidden_layers": 1}, r"holds 'model\.layers\.1\..*no such weight in its 1 blocks"),
        ({"intermediate_size": 96}, r"shape \(64, 32\), but config\.json asks for \(96, 32\)"),
    ],
)
def test_a_config_that_does_not_describe_the_weights(changes, message, dense, refused):
    edit_json(dense / "config.json", **changes)
    refused(ValueError, message, dense)


def test_checkpoints_that_are_not_whole(dense, tmp_path, refused):
    file = dense / "model.safetensors"
    whole = file.read_bytes()
    for keep in (0, 5, 200, -1):
        file.write_bytes(whole[:keep])
        refused(ValueError, r"not a whole safetensors file.* download or copy", dense)
    file.unlink()
    refused(FileNotFoundError, r"no safetensors checkpoint\. Expected model\.safetensors", dense)
    (dense / "pytorch_model.bin").write_bytes(PICKLE)
    refused(FileNotFoundError, r"pytorch_model\.bin, a pickle, .* never loaded", dense)


@pytest.mark.parametrize(
    "name",
    [*OUTSIDE, "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.experts.2.w3.weight"],
)
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_a_weight_that_is_not_there(name, method, tmp_path, refused):
    dense = tiny_checkpoint(tmp_path / "dense", "mixtral" if "experts" in name else "llama")
    stored = name.replace("mlp.experts", "block_sparse_moe.experts")
    edit_tensors(dense, lambda tensors: tensors.pop(stored))
    # Without its head a model is of another kind, and is refused as such.
    kind = NotImplementedError if name == "lm_head.weight" else ValueError
    refused(kind, f"holds no weight for {name.removesuffix('.weight')}", dense, method=method)


@pytest.mark.parametrize(
    ("silent", "message"),
    [
        ("", r"'org/model' is neither .* hub: no route to the hub$"),
        ("no name", r"'org/model' is neither .* no answer \(no name\)\. Give the folder of a"),
    ],
)
def test_a_hub_id_that_cannot_be_downloaded(silent, message, monkeypatch, refused):
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"], options["local_files_only"]))
        raise ConnectionError("no route to the hub\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("prunus.model.checkpoint.resolve.no_answer", lambda: silent)
    refused(FileNotFoundError, message, "org/model")
    [(name, patterns, only_local)] = asked
    assert (name, only_local) == ("org/model", bool(silent))
    assert not any(glob.endswith((".bin", ".pt", ".py", "*")) for glob in patterns), "no code"


# --- options and text ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:5"}, r"layers\.0\.self_attn\.q_proj has 32 inputs, .* multiple of 5"),
        ({"pattern": "5:4"}, "1 <= N <= M; got '5:4'"),
        ({"method": "wanda-variant", "pattern": "2:4"}, "wanda-variant has no 2:4 form"),
        ({"ignore": ["lm_head"]}, "`ignore` 'lm_head' matches none of the 14 linears"),
        ({"device": "cuda:99"}, r"device 'cuda:99' is not there: \d+ CUDA devices are visible"),
        ({"memory": "1MB", "device": "cpu"}, "the memory budget is .*Raise `memory`"),
        ({"calibration": token_ids().float()}, r"integers \(windows, tokens\), got torch\.float32"),
        ({"calibration": token_ids()[0]}, r"must be integers \(windows, tokens\)"),
        ({"calibration": token_ids()[:0]}, r"\(windows, tokens\), got torch\.int64 \(0, 16\)"),
        ({"calibration": token_ids()[:, :1]}, "seqlen must be at least 2 tokens; got 1"),
        ({"calibration": token_ids() + VOCABULARY}, f"from 261 to 382, but .* {VOCABULARY} rows"),
        ({"calibration": token_ids() - 100}, "the calibration token ids run from -97 to"),
        ({"calibration": token_ids(2, 65)}, "windows of 65 tokens do not fit: .* 64 positions"),
        ({"calibration": "python-docs", "samples": 0}, "samples must be at least 1"),
    ],
)
def test_options_that_make_no_sense(options, message, dense, tmp_path, refused):
    refused(ValueError, message, dense, **options)


def test_a_loaded_model_and_an_output_folder_exclude_each_other(dense, tmp_path, refused):
    refused(ValueError, "leave output out and call its save_pretrained", tiny_model())
    with pytest.raises(ValueError, match="pruned into a new folder: give output"):
        prunus.prune(dense, calibration=token_ids())
    with pytest.raises(TypeError, match=r"expected a transformers model .* got Linear"):
        prunus.prune(torch.nn.Linear(3, 3), calibration=token_ids())
    with pytest.raises(ValueError, match="needs its tokenizer: pass tokenizer="):
        prunus.prune(tiny_model(), calibration="python-docs", samples=2, seqlen=16)


# --- the output folder ---


def test_a_damaged_manifest(dense, tmp_path, refused):
    (tmp_path / "out").mkdir()
    for content in ("{", "{}", '{"format": 2}'):
        (tmp_path / "out" / Manifest.FILE).write_text(content)
        refused(ValueError, rf"{Manifest.FILE} is (not valid JSON|damaged or of another)", dense)
    report = prunus.prune(dense, tmp_path / "out", calibration=token_ids(), overwrite=True)
    assert report.state == "finished"


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_finished_run_that_lost_a_shard_is_not_finished(harm, dense, tmp_path, refused):
    prunus.prune(dense, tmp_path / "out", calibration=token_ids())
    shard = tmp_path / "out" / "model-00002-of-00003.safetensors"
    if harm == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:1000])
    refused(FileExistsError, rf"damaged since: .*{shard.name}.*overwrite`? ma", dense)


# --- errors in the middle of a run ---


def spoil(dense: Path, name: str, value: float) -> None:
    edit_tensors(dense, lambda tensors: tensors[name].view(-1)[3].fill_(value))


def check_unfinished(out: Path, blocks: int, of: int) -> None:
    """Check that the folder holds finished blocks only, and does not pass for a model."""
    shards = [shard_name(index, of + 1) for index in (*range(blocks), of)]
    assert sorted(path.name for path in out.iterdir()) == [*shards, Manifest.FILE]
    manifest = Manifest.load(out)
    assert (manifest.state, len(manifest.blocks)) == ("running", blocks)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_weights_that_are_not_finite(value, method, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=3)
    whole = load_file(dense / "model.safetensors")
    spoil(dense, "model.layers.1.mlp.up_proj.weight", value)
    source = tree(dense)
    with pytest.raises(ValueError, match=r"\.1\.mlp\.up_proj\.weight holds .* not finite"):
        prunus.prune(dense, tmp_path / "out", method, calibration=token_ids())
    assert tree(dense) == source
    check_unfinished(tmp_path / "out", blocks=1, of=3)
    # With a corrected model the run continues, and its result is that of a run that never failed.
    save_file(whole, dense / "model.safetensors", metadata={"format": "pt"})
    steps: list[Any] = []
    for name in ("out", "undisturbed"):
        prunus.prune(dense, tmp_path / name, method, calibration=token_ids(), progress=steps.append)
    assert "earlier run" in steps[0].message
    assert shards(tmp_path / "out") == shards(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("dtype", "factor"), [("float32", 1e30), ("float16", 1e5), ("bfloat16", 1e30)], ids=str
)
@pytest.mark.parametrize("propagate", ["linear", "block"])
def test_activations_that_are_not_finite(dtype, factor, propagate, dense, tmp_path):
    for name in ("gate_proj", "up_proj"):
        edit_tensors(dense, lambda x: x[f"model.layers.1.mlp.{name}.weight"].mul_(factor))  # noqa: B023
    source = tree(dense)
    with pytest.raises(ValueError, match=r"reach model\.layers\.1\.mlp\.down_proj are not finite"):
        prunus.prune(
            dense, tmp_path / "out", calibration=token_ids(), dtype=dtype, propagate=propagate
        )
    assert tree(dense) == source
    check_unfinished(tmp_path / "out", blocks=1, of=2)


@pytest.mark.parametrize("name", OUTSIDE)
def test_weights_outside_the_blocks_that_are_not_finite(name, dense, tmp_path):
    spoil(dense, name, torch.inf)
    with pytest.raises(ValueError, match=f"{name} holds weights that are not finite"):
        prunus.prune(dense, tmp_path / "out", calibration=token_ids())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", *OUTSIDE])
def test_verbs_that_read_a_whole_model_name_what_is_not_finite(name, dense):
    byte_tokenizer().save_pretrained(dense)
    spoil(dense, name, torch.nan)
    for read in (prunus.load, prunus.inspect)[: 1 if name in OUTSIDE else 2]:
        assert_refused(ValueError, f"{name} holds weights that are not finite", read, dense)


def test_a_loaded_model_names_what_is_not_finite():
    embeddings, weight = tiny_model(), tiny_model()
    with torch.no_grad():
        embeddings.model.embed_tokens.weight.fill_(torch.inf)
        weight.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    for model, message in (
        (embeddings, "the embeddings give hidden states that are not finite"),
        (weight, r"model\.layers\.1\.self_attn\.o_proj\.weight .* not finite"),
    ):
        assert_refused(ValueError, message, prunus.prune, model, calibration=token_ids())
