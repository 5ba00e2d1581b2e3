"""GGUF files of prunus and of llama.cpp at equal bytes, judged by llama.cpp's own programs.

    python benchmarks/proof.py WORK NAME=CHECKPOINT … --data DIR --json docs/results/proof.json

CHECKPOINT is a folder: one that benchmarks/small_llama.py trained, or one that benchmarks/dither.py
made from a file of benchmarks/fetch_model.py. Without --llama-cpp, llama.cpp is built in WORK from
the source that the package llama-cpp-python carries (it needs a C++ compiler; about ten minutes).

From each checkpoint llama.cpp's converter makes one GGUF file in bfloat16, tied where the
checkpoint is tied, and that file's logits are what all others are compared with. For the bytes of
each preset there are these rows:

    preset        llama-quantize with an importance matrix
    its types     prunus's rounding, with the types that the preset chose
    prunus types  llama-quantize (--tensor-type-file), with the types that prunus chose
    prunus        prunus compress --size BYTES
    fast          the same, with types that a processor decodes fast (--fast-on)
    nearest       the same types as prunus, rounded weight by weight (--rounding nearest)
    fixed head    prunus, with embedding and head as the preset has them (Q6_K)
    autoround     AutoRound's GGUF export of the same scheme, at its default settings but for the
                  tokens; it needs --auto-round, the interpreter of a venv that has auto-round

Both programs calibrate on the same tokens of `mix`, of which nothing is scored. Each file is scored
by llama-perplexity --kl-divergence on wiki.test.raw and on modules of Python's standard library, in
chunks of 512 tokens, of which llama.cpp scores the second half. llama-bench measures how fast it
decodes, and reads a prompt; files take turns. All files of a model must hold the same number of
weights. A row that is in the JSON file is not measured again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from type_speeds import tokens_per_second

from prunus.calibration.corpora import load_corpus
from prunus.calibration.draw import encode
from prunus.calibration.sources import find_source
from prunus.calibration.windows import WindowRequest
from prunus.hardware.machine import describe_hardware, versions
from prunus.model.checkpoint.files import file_digest
from prunus.model.checkpoint.tensor_files import Checkpoint

PRESETS = "Q2_K,Q3_K_M,IQ4_XS,Q4_K_M,Q5_K_M"
ROWS = "preset,its types,prunus types,prunus"
PROGRAMS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench")
#: Chunks of 512 tokens that are scored -> by text.
CHUNKS = {"WikiText-2": 100, "Python": 40}
#: Runs the converter of llama.cpp, or AutoRound, which imports a copy of it when it exports. A
#: tokenizer that a converter has not seen splits words as GPT-2's does; see small_training.py.
CONVERT = """
import importlib, runpy, sys
load = importlib.import_module
def import_module(name, package=None):
    module = load(name, package)
    if name == "conversion":
        model = load("conversion.base").TextModel
        known = model.get_vocab_base_pre
        def split_as(self, tokenizer):
            try:
                return known(self, tokenizer)
            except NotImplementedError:
                return "gpt-2"
        model.get_vocab_base_pre = split_as
    return module
importlib.import_module = import_module
script = sys.argv.pop(1)
sys.argv[0] = script
if script.endswith(".py"):
    import_module("conversion")
    runpy.run_path(script, run_name="__main__")
else:
    runpy.run_module(script, run_name="__main__")
"""


def run(command: list[Any], log: Path, **options: Any) -> str:
    """Run a program and return what it printed, which `log` holds as well.

    What it says meanwhile is in another file: the two would run into each other.
    """
    words, messages = [str(word) for word in command], log.with_suffix(".messages")
    with log.open("w") as output, messages.open("w") as errors:
        done = subprocess.run(words, check=False, stdout=output, stderr=errors, **options)
    if done.returncode:
        raise RuntimeError(f"{words[0]} failed, exit status {done.returncode}; see {messages}")
    return log.read_text(errors="replace")


def once(path: Path, make: Callable[[Path], Any]) -> Path:
    """Make a file under another name, and give it its own when it is whole; if it is not there."""
    if not path.exists():
        partial = path.with_name(f"partial-{path.name}")
        partial.unlink(missing_ok=True)
        make(partial)
        partial.replace(path)
    return path


# llama.cpp.


def write_calibration(path: Path, checkpoint: Path, samples: int, data: Path | None) -> None:
    """Write windows of 256 tokens of `mix` as text, for programs that calibrate on a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    draw = WindowRequest(
        samples=samples + 1,  # tokens at the borders may become fewer
        seqlen=256,
        data=data,
        tokenizer=lambda: tokenizer,
    )
    text = "".join(tokenizer.decode(ids) for ids in find_source("mix").draw(draw).ids)
    path.write_text(tokenizer.decode(encode(tokenizer, text)[: samples * 256]), encoding="utf-8")


def build_llama_cpp(work: Path) -> Path:
    """Build llama.cpp from the source that llama-cpp-python carries; returns its folder."""
    folders = sorted(work.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if not folders:
        pip = [sys.executable, "-m", "pip"]
        tools = ["cmake", "ninja", "scikit-build-core", "setuptools"]
        run([*pip, "install", *tools], work / "tools.log")
        source = ["llama-cpp-python", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        run([*pip, "download", *source, "-d", work], work / "download.log")
        with tarfile.open(next(work.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        folders = sorted(work.glob("llama_cpp_python-*/vendor/llama.cpp"))
    folder = folders[-1]
    build = folder / "build"
    options = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF"]
    options += ["-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DGGML_NATIVE=ON"]
    # What pip has installed is beside the interpreter, which may run without its venv activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = {"env": os.environ | {"PATH": path}}
    run(["cmake", "-S", folder, "-B", build, *options], work / "configure.log", **found)
    run(["cmake", "--build", build, "--target", *PROGRAMS], work / "build.log", **found)
    return folder


class Judge:
    """Everything that llama.cpp makes and measures for one checkpoint, each file once.

    Args:
        llama: folder of llama.cpp's source, with its programs in build/bin.
        work: folder for files of this model.
        checkpoint: the dense model.
        options: of the command line.
    """

    def __init__(
        self, llama: Path, work: Path, checkpoint: Path, options: argparse.Namespace
    ) -> None:
        self.llama, self.work, self.checkpoint, self.options = llama, work, checkpoint, options
        self.threads = torch.get_num_threads()

    def program(self, name: str) -> Path:
        return self.llama / "build" / "bin" / name

    def dense(self) -> Path:
        """The model as a GGUF file in bfloat16, by llama.cpp's converter."""
        script = self.llama / "convert_hf_to_gguf.py"
        command = [sys.executable, "-c", CONVERT, script, self.checkpoint, "--outtype", "bf16"]
        log = self.work / "dense-convert.log"
        return once(
            self.work / "dense.gguf",
            lambda partial: run([*command, "--outfile", partial], log, cwd=self.llama),
        )

    def calibration(self) -> Path:
        """The text that both programs calibrate on."""
        samples, data = self.options.samples, self.options.data
        return once(
            self.work / "calibration.txt",
            lambda path: write_calibration(path, self.checkpoint, samples, data),
        )

    def importance_matrix(self) -> Path:
        command = [self.program("llama-imatrix"), "-m", self.dense(), "-f", self.calibration()]
        command += ["--no-ppl", "-c", "512", "-b", "512", "-t", self.threads]
        return once(
            self.work / "imatrix.gguf",
            lambda partial: run([*command, "-o", partial], self.work / "imatrix.log"),
        )

    def quantise(self, name: str, preset: str, *options: Any) -> Path:
        """A file of llama-quantize."""
        command = [self.program("llama-quantize"), "--imatrix", self.importance_matrix(), *options]
        return once(
            self.work / f"{name}.gguf",
            lambda partial: run(
                [*command, self.dense(), partial, preset, self.threads], self.work / f"{name}.log"
            ),
        )

    def auto_round(self, preset: str) -> Path:
        """A file of AutoRound, tuned on the same tokens."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.checkpoint)
        ids = encode(tokenizer, self.calibration().read_text(encoding="utf-8")).tolist()
        # Decoded and encoded again, a window may have fewer tokens; AutoRound takes whole ones.
        texts = [tokenizer.decode(ids[start : start + 264]) for start in range(0, len(ids), 256)]
        data = self.work / "calibration.json"
        data.write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
        scheme = f"gguf:{preset.lower()}"
        folder = self.work.resolve() / f"{preset}-autoround"
        command = [self.options.auto_round.absolute(), "-c", CONVERT, "auto_round"]
        command += ["--model", self.checkpoint, "--scheme", scheme, "--format", scheme]
        # AutoRound cuts the name of a data set at commas and blanks, which a folder may have.
        command += ["--device", "cpu", "--output_dir", folder, "--dataset", data.name]
        command += ["--nsamples", self.options.samples - 1, "--seqlen", 256]

        def make(partial: Path) -> None:
            run(command, self.work / f"{preset}-autoround.log", cwd=self.work)
            next(folder.rglob("*.gguf")).replace(partial)

        return once(self.work / f"{preset}-autoround.gguf", make)

    def text(self, name: str) -> Path:
        """The file with a text to score."""
        if name == "WikiText-2":
            return Path(self.options.data) / "wikitext2" / "wiki.test.raw"
        code = load_corpus("python-code", "scoring", self.options.data)
        return once(
            self.work / "python.txt",
            lambda partial: partial.write_text("\n\n".join(code.documents), encoding="utf-8"),
        )

    def score(self, file: Path) -> dict[str, dict[str, float]]:
        """By text: mean KL divergence with its standard error, quantiles, and the same top token.

        Divergences are in nats, shares of tokens in per cent.
        """
        scores = {}
        for name, chunks in CHUNKS.items():
            command = [self.program("llama-perplexity"), "-c", "512", "-b", "512"]
            command += ["-t", self.threads, "--kl-divergence-base", self._logits(name, chunks)]
            command += ["-m", file, "--kl-divergence"]
            log = self.work / f"{file.stem}-{name}.log"
            try:
                scores[name] = read_scores(run(command, log))
            except ValueError:
                # Once in some hundred runs it ended well, and the last lines were missing.
                scores[name] = read_scores(run(command, log))
        return scores

    def _logits(self, name: str, chunks: int) -> Path:
        """The logits of the dense model."""
        command = [self.program("llama-perplexity"), "-m", self.dense(), "-f", self.text(name)]
        command += ["-c", "512", "-b", "512", "-t", self.threads, "--chunks", chunks]
        return once(
            self.work / f"logits-{name}.bin",
            lambda partial: run(
                [*command, "--save-all-logits", partial], self.work / f"logits-{name}.log"
            ),
        )

    def speed(self, file: Path) -> dict[str, float]:
        """Tokens per second of a prompt of 128 tokens, and of decoding 32."""
        prompt, decode = tokens_per_second(self.program("llama-bench"), file, self.threads)
        return {"prompt": prompt, "decode": decode}


def read_scores(printed: str) -> dict[str, float]:
    """The statistics that llama-perplexity prints.

    >>> printed = "Mean    KLD:   0.2914 ±   0.006; 99.9%   KLD:   3.88; Same top p: 71.7 ± 0.5 %"
    >>> read_scores(printed + "; Median  KLD: 0.1; Maximum KLD: 9.1") == {
    ...     'kl': 0.2914, 'kl_stderr': 0.006, 'kl_median': 0.1, 'kl_99.9': 3.88,
    ...     'kl_maximum': 9.1, 'same_top': 71.7,
    ... }
    True

    Raises:
        ValueError: One of them is missing.
    """
    number = r"([-\d.einf]+)"
    patterns = {
        "kl": rf"Mean\s+KLD:\s+{number}",
        "kl_stderr": rf"Mean\s+KLD:\s+{number}\s+±\s+{number}",
        "kl_median": rf"Median\s+KLD:\s+{number}",
        "kl_99.9": rf"99.9%\s+KLD:\s+{number}",
        "kl_maximum": rf"Maximum\s+KLD:\s+{number}",
        "same_top": rf"Same top p:\s+{number}",
    }
    scores = {}
    for name, pattern in patterns.items():
        match = re.search(pattern, printed)
        if match is None:
            raise ValueError(f"llama-perplexity did not print {name}: {printed[-2000:]}")
        scores[name] = float(match.groups()[-1])
    return scores


# Files.


def facts(file: Path) -> dict[str, Any]:
    """Bytes, weights in matrices, bits of the linears in blocks, types and SHA-256 of a file."""
    from gguf import GGUFReader

    tensors = GGUFReader(file).tensors
    linears = [x for x in tensors if x.name.startswith("blk.") and len(x.shape) > 1]
    types: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1:
            kind = tensor.tensor_type.name
            types[kind] = types.get(kind, 0) + int(tensor.n_bytes)
    return {
        "bytes": file.stat().st_size,
        "weights": sum(int(x.n_elements) for x in tensors if len(x.shape) > 1),
        "bits_of_linears": 8
        * sum(int(x.n_bytes) for x in linears)
        / sum(int(x.n_elements) for x in linears),
        "bytes_by_type": types,
        "sha256": file_digest(file),
    }


def type_list(file: Path, target: Path) -> Path:
    """The types of a GGUF file as llama-quantize takes them: a name and a type per line."""
    from gguf import GGUFReader

    lines = [
        # The name is a regular expression there, which may match anywhere.
        f"^{re.escape(tensor.name)}$={tensor.tensor_type.name.lower()}"
        for tensor in GGUFReader(file).tensors
        if len(tensor.shape) > 1
    ]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def compress(judge: Judge, name: str, *options: Any) -> tuple[Path, float]:
    """A file of `prunus compress`, and the seconds that it took; 0 if it was there."""
    file = judge.work / name
    command = [sys.executable, "-m", "prunus", "compress", judge.checkpoint, file, *options]
    command += ["--calibration", judge.calibration(), "--samples", judge.options.samples]
    command += ["--seqlen", 256, "--quiet"]
    started = time.perf_counter()
    if not file.exists():
        run(command, judge.work / f"{name}.log")
    return file, time.perf_counter() - started


def make_row(judge: Judge, preset: str, row: str) -> tuple[Path, float]:
    """The file of one row, and the seconds that it took to make."""
    baseline = judge.quantise(preset, preset)
    size = baseline.stat().st_size
    if row == "preset":
        return baseline, 0.0
    if row == "its types":
        return compress(judge, f"{preset}-rounding.gguf", "--type", baseline)
    if row == "autoround":
        started = time.perf_counter()
        return judge.auto_round(preset), time.perf_counter() - started
    if row == "fixed head":
        return compress(judge, f"{preset}-head.gguf", "--size", size, "--head-bits", 6)
    if row == "nearest":
        return compress(judge, f"{preset}-nearest.gguf", "--size", size, "--rounding", "nearest")
    if row == "fast":
        fast_on = ("--fast-on", judge.options.fast_on)
        return compress(judge, f"{preset}-fast.gguf", "--size", size, *fast_on)
    ours, seconds = compress(judge, f"{preset}-prunus.gguf", "--size", size)
    if row == "prunus":
        return ours, seconds
    types = type_list(ours, judge.work / f"{preset}-prunus.types")
    return judge.quantise(f"{preset}-types", preset, "--tensor-type-file", types), 0.0


# The run.


def measure(judge: Judge, figures: dict[str, Any], save: Callable[[], None]) -> None:
    """Make and score every row of a model that is not in the figures yet."""
    dense = facts(judge.dense())
    figures.setdefault("dense", dense)
    check_weights(judge.checkpoint, dense)
    for preset in judge.options.presets.split(","):
        rows = figures.setdefault("rows", {}).setdefault(preset, {})
        for row in judge.options.rows.split(","):
            if row in rows:
                continue
            file, seconds = make_row(judge, preset, row)
            found = facts(file)
            check_weights(judge.checkpoint, found)
            rows[row] = {**found, "seconds": round(seconds), "scores": judge.score(file)}
            save()
            means = [f"{name} {x['kl']:.4f}" for name, x in rows[row]["scores"].items()]
            print(time.strftime("%H:%M:%S"), preset, row, found["bytes"], *means, flush=True)


def check_weights(checkpoint: Path, found: dict[str, Any]) -> None:
    """Check that a file has the weights of the checkpoint, and none twice.

    Raises:
        ValueError: It does not; a comparison at equal bytes would not be fair.
    """
    shapes = [info.shape for info in Checkpoint(checkpoint).tensors.values()]
    weights = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
    if found["weights"] != weights:
        raise ValueError(
            f"a file holds {found['weights']:,} weights in matrices, and {checkpoint} {weights:,}: "
            "a comparison at equal bytes would not be fair"
        )


def measure_speeds(judge: Judge, figures: dict[str, Any], save: Callable[[], None]) -> None:
    """Let all files take turns; the median of the rounds counts."""
    rounds = judge.options.rounds
    rows = [
        (make_row(judge, preset, name)[0], row)
        for preset, of_preset in figures["rows"].items()
        for name, row in of_preset.items()
        if len(row.get("speeds", [])) < rounds
    ]
    for _ in range(rounds):
        for file, row in rows:
            row.setdefault("speeds", []).append(judge.speed(file))
            save()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for files that are made on the way")
    parser.add_argument("models", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--data", type=Path, required=True, help="folder with the datasets")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, help="its source, with programs in build/bin")
    parser.add_argument("--auto-round", type=Path, help="Python with the package auto-round")
    parser.add_argument("--presets", default=PRESETS, help="Default: %(default)s")
    parser.add_argument("--rows", default=ROWS, help="Default: %(default)s")
    parser.add_argument("--fast-on", default="cpu", help="for the row `fast`")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 256 tokens")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of speed; 0 for none")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    llama = options.llama_cpp or build_llama_cpp(options.work)
    results: dict[str, Any] = {"models": {}}
    if options.json.exists():
        results = json.loads(options.json.read_text(encoding="utf-8"))
    results |= {
        # Without the folders of this machine.
        "command": "python benchmarks/proof.py WORK NAME=CHECKPOINT … --data DIR --json FILE "
        f"--presets {options.presets} --rows {shlex.quote(options.rows)} "
        f"--samples {options.samples}",
        "chunks of 512 tokens": CHUNKS,
        "calibration": f"{options.samples} windows of 256 tokens of mix",
        "hardware": describe_hardware(torch.device("cpu")),
        "versions": versions(),
    }

    def save() -> None:
        text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
        once_more = options.json.with_name(f".{options.json.name}.partial")
        once_more.write_text(text, encoding="utf-8")
        once_more.replace(options.json)

    for argument in options.models:
        name, _, checkpoint = argument.partition("=")
        work = options.work / name
        work.mkdir(exist_ok=True)
        judge = Judge(llama, work, Path(checkpoint).resolve(), options)
        figures = results["models"].setdefault(name, {})
        measure(judge, figures, save)
        measure_speeds(judge, figures, save)
    print(f"{options.json}: python benchmarks/plots.py makes the table and the plot of it")


if __name__ == "__main__":
    main()
