"""GGUF files of prunus and of llama.cpp at equal bytes, judged by llama.cpp's own programs.

    python benchmarks/proof.py WORK NAME=CHECKPOINT … --data DIR --json FILE

CHECKPOINT is a folder: one that benchmarks/small_llama.py trained, or one that benchmarks/dither.py
made from a file of benchmarks/fetch_model.py. Without --llama-cpp, llama.cpp is built in WORK from
the source that the package llama-cpp-python carries (it needs a C++ compiler; about ten minutes).

From each checkpoint llama.cpp's converter makes one GGUF file in bfloat16, tied where the
checkpoint is tied, and that file's logits are what all others are compared with. For the bytes of
each preset there are these rows:

    preset        llama-quantize with an importance matrix
    more tokens   the same, with an importance matrix of ten times as many tokens
    its types     prunus's rounding, with the types that the preset chose
    prunus types  llama-quantize (--tensor-type-file), with the types that prunus chose
    prunus        prunus compress --size BYTES
    fast          the same, with types that a processor decodes fast (--fast-on)
    nearest       the same size, with each weight rounded by itself (--rounding nearest)
    fixed head    prunus, with embedding and head as the preset has them (Q6_K)
    autoround     AutoRound's GGUF export of the same scheme, at its default settings but for the
                  tokens; it needs --auto-round, the interpreter of a venv that has auto-round

Files of given types (`its types`, `prunus types`) may differ by 0.3 % from the preset's bytes.

Both programs calibrate on the same tokens of `mix`, of which nothing is scored; only `more tokens`
has others. A row of Q8_0 is the floor: what a file loses in this judgement that lost next to
nothing. llama-perplexity --kl-divergence scores each file on the texts of proof_texts.py, in chunks
of 512 tokens and of 2,048, of which it scores the second half. The figures file keeps the values of
each chunk, so that window_errors.py can pair those of two files. With --tasks, the same program
scores rows of HellaSwag, the same ones for each file. llama-bench measures how fast it decodes, and
reads a prompt; files take turns. All files of a model must hold the same number of weights. A row
that is in the JSON file is not measured again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import torch
from proof_texts import TEXTS, hellaswag, text_of, with_plain_tokens
from type_speeds import tokens_per_second
from window_errors import by_task, by_window

from prunus.calibration.draw import encode
from prunus.calibration.sources import find_source
from prunus.calibration.windows import WindowRequest
from prunus.model.checkpoint.files import file_digest
from prunus.model.checkpoint.tensor_files import Checkpoint

PRESETS = "Q2_K,Q3_K_M,IQ4_XS,Q4_K_M,Q5_K_M"
ROWS = "preset,more tokens,its types,prunus types,prunus"
#: The preset whose file loses next to nothing; it has no other rows.
FLOOR = "Q8_0"
PROGRAMS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench")
#: Tokens of a chunk -> the field of a row that holds its scores by text.
SCORES = {512: "scores", 2048: "long scores"}
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

    def calibration(self, times: int = 1) -> Path:
        """The text that both programs calibrate on, or one of so many times as many tokens."""
        samples, data = times * self.options.samples, self.options.data
        return once(
            self.work / f"calibration-{samples}.txt",
            lambda path: write_calibration(path, self.checkpoint, samples, data),
        )

    def importance_matrix(self, times: int) -> Path:
        command = [self.program("llama-imatrix"), "-m", self.dense(), "-f", self.calibration(times)]
        # Tokens of the chat template are what they are for prunus.
        command += ["--no-ppl", "--parse-special", "-c", "512", "-b", "512", "-t", self.threads]
        name = f"imatrix-{times * self.options.samples}"
        return once(
            self.work / f"{name}.gguf",
            lambda partial: run([*command, "-o", partial], self.work / f"{name}.log"),
        )

    def quantise(self, name: str, preset: str, *options: Any, times: int = 1) -> Path:
        """A file of llama-quantize, with an importance matrix of so many times the tokens."""
        matrix = [] if preset == FLOOR else ["--imatrix", self.importance_matrix(times)]
        command = [self.program("llama-quantize"), *matrix, *options]
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
        data = self.options.data
        return once(
            self.work / f"text-{name}.txt",
            lambda path: path.write_text(text_of(name, data, self.checkpoint), encoding="utf-8"),
        )

    def score(self, file: Path, text: str, length: int) -> dict[str, Any]:
        """What `read_scores` returns for chunks of a text."""
        command = [*self._perplexity(length), "-m", file, "--kl-divergence"]
        command += ["--kl-divergence-base", self.logits(text, length)]
        log = self.work / f"{file.stem}-{text}-{length}.log"
        try:
            return read_scores(run(command, log))
        except ValueError:
            # Once in some hundred runs it ended well, and the last lines were missing.
            return read_scores(run(command, log))

    def solve(self, file: Path) -> str:
        """Which tasks of HellaSwag a file solves; see `by_task`."""
        rows = once(
            self.work / "hellaswag.txt",
            lambda path: path.write_text(hellaswag(self.options.data), encoding="utf-8"),
        )
        command = [*self._perplexity(512), "-m", file, "-f", rows, "--hellaswag"]
        log = self.work / f"{file.stem}-hellaswag.log"
        return by_task(run([*command, "--hellaswag-tasks", self.options.tasks], log))

    def _perplexity(self, length: int) -> list[Any]:
        """The beginning of a command of llama-perplexity, for chunks of a length."""
        return [self.program("llama-perplexity"), "-c", length, "-b", "512", "-t", self.threads]

    def logits_file(self, text: str, length: int) -> Path:
        return self.work / f"logits-{text}-{length}.bin"

    def logits(self, text: str, length: int) -> Path:
        """The logits of the dense model, with the token ids of the text."""
        model, chunks = self.dense(), self.options.chunks[list(SCORES).index(length)]
        if text == "chats":
            model = once(self.work / "dense-plain.gguf", self._write_plain)
        command = [*self._perplexity(length), "-m", model, "-f", self.text(text)]
        command += ["--chunks", chunks, "--save-all-logits"]
        file = self.logits_file(text, length)
        return once(file, lambda partial: run([*command, partial], file.with_suffix(".log")))

    def _write_plain(self, path: Path) -> None:
        shutil.copy(self.dense(), path)
        with_plain_tokens(path)

    def speed(self, file: Path) -> dict[str, float]:
        """Tokens per second of a prompt of 128 tokens, and of decoding 32."""
        prompt, decode = tokens_per_second(self.program("llama-bench"), file, self.threads)
        return {"prompt": prompt, "decode": decode}


def read_scores(printed: str) -> dict[str, Any]:
    """The statistics that llama-perplexity prints, and the values of each window.

    Divergences are in nats, shares of tokens in per cent. `kl_stderr` is the program's own error,
    over all tokens.

    >>> printed = "Mean    KLD:   0.2914 ±   0.006; 99.9%   KLD:   3.88; Same top p: 71.7 ± 0.5 %"
    >>> printed += "; Median  KLD: 0.1; Maximum KLD: 9.1; Mean PPL(Q) : 20.5; Mean PPL(base) : 18.1"
    >>> read_scores(printed) == {
    ...     'kl': 0.2914, 'kl_stderr': 0.006, 'kl_median': 0.1, 'kl_99.9': 3.88, 'kl_maximum': 9.1,
    ...     'same_top': 71.7, 'perplexity': 20.5, 'dense': 18.1, 'kl_by_window': [],
    ...     'log_ratio_by_window': [],
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
        "perplexity": rf"Mean PPL\(Q\)\s*:\s+{number}",
        "dense": rf"Mean PPL\(base\)\s*:\s+{number}",
    }
    scores: dict[str, Any] = {}
    for name, pattern in patterns.items():
        match = re.search(pattern, printed)
        if match is None:
            raise ValueError(f"llama-perplexity did not print {name}: {printed[-2000:]}")
        scores[name] = float(match.groups()[-1])
    for name, values in zip(("kl", "log_ratio"), by_window(printed), strict=True):
        scores[f"{name}_by_window"] = [round(value, 5) for value in values]
    return scores


# Files.


def facts(file: Path) -> dict[str, Any]:
    """Bytes, weights in matrices, bits of the linears in blocks, types and SHA-256 of a file.

    The metadata of a file names folders and versions, so the tensors have a SHA-256 of their own:
    that of all bytes after the metadata.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    tensors = reader.tensors
    with file.open("rb") as data:
        data.seek(reader.data_offset)
        of_tensors = hashlib.file_digest(data, "sha256").hexdigest()
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
        "sha256_of_tensors": of_tensors,
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
    if row == "more tokens":
        return judge.quantise(f"{preset}-more", preset, times=10), 0.0
    if row == "autoround":
        started = time.perf_counter()
        return judge.auto_round(preset), time.perf_counter() - started
    options = {
        "its types": ["--type", baseline],
        "fixed head": ["--size", size, "--head-bits", 6],
        "nearest": ["--size", size, "--rounding", "nearest"],
        "fast": ["--size", size, "--fast-on", judge.options.fast_on],
        "prunus": ["--size", size],
    }
    if row in options:
        return compress(judge, f"{preset}-{row}.gguf".replace(" ", "-"), *options[row])
    ours, _ = compress(judge, f"{preset}-prunus.gguf", *options["prunus"])
    types = type_list(ours, judge.work / f"{preset}-prunus.types")
    return judge.quantise(f"{preset}-types", preset, "--tensor-type-file", types), 0.0


# The run.


def make_rows(judge: Judge, figures: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """The file and the figures of every row of a model, the dense model first."""
    dense, options = judge.dense(), judge.options
    made = [(dense, figures.setdefault("dense", facts(dense)))]
    check_weights(judge.checkpoint, figures["dense"])
    wanted = {preset: options.rows.split(",") for preset in options.presets.split(",")}
    for preset, names in (wanted | {FLOOR: ["preset"]}).items():
        rows = figures.setdefault("rows", {}).setdefault(preset, {})
        for name in names:
            file, seconds = make_row(judge, preset, name)
            if name not in rows:
                rows[name] = {**facts(file), "seconds": round(seconds)}
                print(time.strftime("%H:%M:%S"), preset, name, rows[name]["bytes"], flush=True)
            check_weights(judge.checkpoint, rows[name])
            made.append((file, rows[name]))
    return made


def measure(
    judge: Judge,
    figures: dict[str, Any],
    made: list[tuple[Path, dict[str, Any]]],
    save: Callable[[], None],
) -> None:
    """Score what `make_rows` made, text by text, as far as it is not in the figures yet."""
    (dense, of_dense), *rows = made
    scored = zip(SCORES.items(), judge.options.chunks, strict=True)
    for length, field in (score for score, chunks in scored if chunks):
        for text in judge.options.texts.split(","):
            figures.setdefault("texts", {})[text] = file_digest(judge.text(text))
            for file, row in rows:
                if text not in row.setdefault(field, {}):
                    row[field][text] = judge.score(file, text, length)
                    save()
                    means = f"{text} {length} {row[field][text]['kl']:.4f}"
                    print(time.strftime("%H:%M:%S"), file.stem, means, flush=True)
            # A gigabyte and more, which no other text needs.
            judge.logits_file(text, length).unlink(missing_ok=True)
    for file, row in [(dense, of_dense), *rows] if judge.options.tasks else ():
        if "hellaswag" not in row:
            row["hellaswag"] = judge.solve(file)
            save()
            solved = row["hellaswag"].count("1")
            print(time.strftime("%H:%M:%S"), file.stem, "HellaSwag", solved, flush=True)


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


def measure_speeds(
    judge: Judge, made: list[tuple[Path, dict[str, Any]]], save: Callable[[], None]
) -> None:
    """Let all files but the dense one take turns; the median of the rounds counts."""
    field, rounds = judge.options.speeds, judge.options.rounds
    rows = [(file, row) for file, row in made[1:] if len(row.get(field, [])) < rounds]
    for _ in range(rounds):
        for file, row in rows:
            row.setdefault(field, []).append(judge.speed(file))
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
    parser.add_argument(
        "--texts",
        default=",".join(TEXTS),
        help="Default: %(default)s. Leave out chats for a model without a chat template.",
    )
    parser.add_argument(
        "--chunks", type=int, nargs=2, default=(100, 25), help="of 512, of 2,048 tokens; or 0"
    )
    parser.add_argument("--tasks", type=int, default=1000, help="rows of HellaSwag; 0 for none")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of speed; 0 for none")
    parser.add_argument(
        "--speeds",
        default="speeds",
        help="field of the figures for these measurements; one for each build of llama.cpp",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    llama = options.llama_cpp or build_llama_cpp(options.work)
    results = figures.load(options.json)
    # Without the folders of this machine.
    command = (
        "python benchmarks/proof.py WORK NAME=CHECKPOINT … --data DIR --json FILE "
        f"--presets {options.presets} --rows {shlex.quote(options.rows)} "
        f"--samples {options.samples} --chunks {options.chunks[0]} {options.chunks[1]} "
        f"--tasks {options.tasks} --rounds {options.rounds} --fast-on {options.fast_on}"
    )
    results |= {
        "chunks": dict(zip(SCORES, options.chunks, strict=True)),
        "calibration": f"{options.samples} windows of 256 tokens of mix",
        "fast_on": options.fast_on,
    }
    results.setdefault("models", {})
    save = functools.partial(figures.save, options.json, results, command)

    for argument in options.models:
        name, _, checkpoint = argument.partition("=")
        work = options.work / name
        work.mkdir(exist_ok=True)
        judge = Judge(llama, work, Path(checkpoint).resolve(), options)
        of_model = results["models"].setdefault(name, {})
        made = make_rows(judge, of_model)
        save()
        measure(judge, of_model, made, save)
        measure_speeds(judge, made, save)
    print(f"{options.json}: python benchmarks/plots.py makes the table and the plot of it")


if __name__ == "__main__":
    main()
