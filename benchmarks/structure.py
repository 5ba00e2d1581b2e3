"""What whole blocks, channels and heads cost: ways to make a model smaller, at the same sizes.

    python benchmarks/structure.py MODEL SCRATCH --data FOLDER [--sizes 0.9 0.75 0.6]
        [--ways blocks width …] [--samples 32] [--seqlen 512] [--tokens N] [--json FILE]
    python benchmarks/structure.py MODEL SCRATCH --speed

MODEL is a checkpoint folder. A size is the share of the parameters in blocks that stays at most.
Blocks and heads go in whole steps, so each way takes the largest of its models that is not above
it, and the table says what it came to. Ways:

    blocks          the search by KL divergence
    flap            FLAP, another width in each block; see benchmarks/flap.py
    width           channels and heads, with columns that are fitted by least squares

All of these are without repair. `blocks+repair` and `width+repair` are with it.
With --tokens there is one more row for each of them, `…+recovery`: `prunus recover --mode full`
towards MODEL on so many tokens. All ways get the same calibration windows.

A row has the KL divergence from MODEL and the perplexity on the texts, and the seconds of processor
time of all threads; of a run that was interrupted, only those of its last part.

--speed measures the checkpoints that are there, at batch 1, and makes none. They take turns with
MODEL, and what counts is the ratio to MODEL in the same turn. Measured is transformers and, if
LLAMA_CPP names a folder with a built llama.cpp, `llama-bench` on bfloat16 GGUF files on one thread.

Every row is in the JSON file as soon as it is measured. The same command skips the rows that are
there, and goes on in the checkpoint where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from flap import flap
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunus
from prunus.calibration.sources import find_source
from prunus.calibration.windows import WindowRequest, hash_ids
from prunus.engine.options import RunOptions
from prunus.engine.session import Session
from prunus.engine.windows import given_windows
from prunus.evaluation.speed import bench
from prunus.hardware.memory import describe_hardware, versions
from prunus.model.checkpoint.atomic_files import read_json, write_json
from prunus.model.skeleton import Skeleton
from prunus.structure.plan import StructureJob, plan_structure
from prunus.structure.records import StructureRecipe
from prunus.structure.run import run

#: Way -> options of `prunus.shrink`, without those that say how much goes.
WAYS: dict[str, dict[str, Any]] = {
    "blocks": {"repair": False},
    "blocks+repair": {},
    "flap": {},
    "width": {"repair": False},
    "width+repair": {},
}
#: Width goes in steps of this share, and at most half of it.
WIDTH_STEP = 1 / 128
RECOVERY = "+recovery"
#: Windows per step: what `prunus shrink` takes with repair. Without it, its default is another.
BATCH = 1
PROMPT_TOKENS, NEW_TOKENS = 32, 65


class Benchmark:
    """The JSON file, and all that makes its rows.

    Args:
        given: the command line.

    Raises:
        ValueError: the file was measured in another way.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.folder: Path = given.scratch
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file: Path = given.json or self.folder / "structure.json"
        self.data = read_json(self.file) if self.file.exists() else {"rows": {}}
        self.rows: dict[str, dict[str, Any]] = self.data["rows"]

    def describe(self) -> None:
        """Note what is measured and with what.

        Raises:
            ValueError: the rows in the file were measured in another way.
        """
        given = self.given
        protocol = {
            "model": given.model.name,
            "calibration": f"{given.samples} windows of {given.seqlen} tokens",
            "calibration_sha256": hash_ids(self.ids),
            "scored": f"{given.limit} windows of {given.eval_seqlen} tokens",
            "texts": [str(text) for text in given.texts],
        }
        for name, before in self.data.get("protocol", {}).items():
            if protocol[name] != before:
                raise ValueError(
                    f"{self.file} was measured with {name} = {before!r}, now it is "
                    f"{protocol[name]!r}; give another --json and SCRATCH"
                )
        self.data |= {
            "protocol": protocol,
            "command": shlex.join(["python", "benchmarks/structure.py", *sys.argv[1:]]),
            "hardware": describe_hardware(torch.device("cpu")),
            "versions": versions(),
        }

    def write(self) -> None:
        write_json(self.file, self.data)

    @functools.cached_property
    def ids(self) -> torch.Tensor:
        """The calibration windows (windows, tokens)."""
        given = self.given
        wanted = WindowRequest(
            samples=given.samples,
            seqlen=given.seqlen,
            data=given.data,
            tokenizer=lambda: self.tokenizer,
        )
        return find_source(given.calibration).draw(wanted).ids

    @functools.cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.given.model)

    def plan(self, **amount: Any) -> StructureJob:
        """The checked run that removes an amount."""
        given = {**given_windows(self.ids)[1], "repair": False, **amount}
        recipe = StructureRecipe.read(None, given)
        return plan_structure(self.given.model, recipe, RunOptions(calibration_data=self.ids))

    @functools.cached_property
    def block_sizes(self) -> list[int]:
        """Parameters of each block of the dense model."""
        return sizes(self.plan(blocks=1).skeleton)

    def amount(self, way: str, size: float) -> dict[str, Any]:
        """The option of `prunus.shrink` for a size.

        Raises:
            ValueError: so much width cannot go.
        """
        every, limit = self.block_sizes, size * sum(self.block_sizes)
        if way.removesuffix("+repair") == "blocks":
            return {"blocks": max(n for n in range(1, len(every)) if sum(every[:n]) <= limit)}

        def narrowed(steps: int, heads: int | None) -> int:
            """Parameters in blocks without so many steps of width."""
            try:
                job = self.plan(width=steps * WIDTH_STEP, heads=heads)
            except (ValueError, NotImplementedError):
                return sum(every)  # nothing would go, or heads cannot
            return sum(sizes(job.smaller(range(len(every))).skeleton))

        # Heads go in steps: with all of them, more channels go, and it may come closer.
        found = {}
        for heads in (None, self.plan(blocks=1).source.config.num_attention_heads):
            steps = next((n for n in range(1, 65) if narrowed(n, heads) <= limit), None)
            if steps is not None:
                found[narrowed(steps, heads)] = {"width": steps * WIDTH_STEP, "heads": heads}
        if not found:
            raise ValueError(f"{self.given.model.name} cannot come to {size:g} by width alone")
        return found[max(found)]

    # Rows.

    def make_row(self, size: float, way: str) -> None:
        """Make one smaller model and score it, unless that is done."""
        tokens = self.given.tokens if way.endswith(RECOVERY) else 0
        key = f"{size:g} {way} {tokens}" if tokens else f"{size:g} {way}"
        if key in self.rows:
            return
        say(f"{key}: making")
        started = time.process_time()
        row: dict[str, Any] = {"size": size, "way": way, "tokens": tokens}
        folder = self.folder / key.replace(" ", "-")
        model: Any = folder
        if way == "flap":
            model = AutoModelForCausalLM.from_pretrained(self.given.model, dtype="auto").eval()
            row["share"] = flap(model, self.ids, size)
        elif tokens:
            before = self.rows[f"{size:g} {way.removesuffix(RECOVERY)}"]
            options = {"tokens": tokens, "seqlen": self.given.seqlen, "data": self.given.data}
            prunus.recover(before["folder"], folder, "full", teacher=self.given.model, **options)
            row |= {"share": before["share"], "folder": str(folder)}
            started -= before["seconds"]
        else:
            row |= self.shrink(folder, WAYS[way] | self.amount(way, size))
        row["seconds"] = round(time.process_time() - started, 1)
        say(f"{key}: {row['share']:.1%} of the parameters in blocks; scoring")
        row["scores"] = self.scores(model)
        self.rows[key] = row
        self.write()
        say(f"{key}: {row['scores']}")

    def shrink(self, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
        """Make a smaller model in a folder."""
        given = {**given_windows(self.ids)[1], "batch": BATCH, **options}
        how = RunOptions(calibration_data=self.ids)
        session = Session(report=lambda now: say(f"{folder.name} {now.done}/{now.total}"))
        record = run(self.given.model, folder, StructureRecipe.read(None, given), how, session)
        gone = record.totals["parameters_before"] - record.totals["parameters"]
        share = 1 - gone / sum(self.block_sizes)
        return {"folder": str(folder), "options": options, "share": share}

    def scores(self, model: Any) -> dict[str, dict[str, Any]]:
        """Quality of a folder or a loaded model on each text."""
        found = {}
        for text in self.given.texts:
            result = prunus.perplexity(
                model,
                text,
                reference=self.given.model,
                tokenizer=None if Path(text).suffix == ".safetensors" else self.tokenizer,
                seqlen=self.given.eval_seqlen,
                samples=self.given.limit,
                data=self.given.data,
            )
            divergence = result.divergence
            found[text] = {
                "perplexity": result.perplexity,
                "dense_perplexity": divergence.reference_perplexity,
                "kl": divergence.kl,
                "kl_stderr": divergence.kl_stderr,
                "same_top": divergence.same_top,
            }
        return found

    # Speed.

    def measure_speed(self) -> None:
        """Let the checkpoints take turns with the dense model."""
        for turn in range(self.given.rounds):
            left = {
                key: Path(row["folder"])
                for key, row in self.rows.items()
                if "folder" in row and len(row.setdefault("speeds", [])) <= turn
            }
            dense = self.speed("dense", self.given.model) if left else {}
            for key, folder in left.items():
                own = self.speed(key, folder)
                ratios = {name: value / dense[name] for name, value in own.items()}
                self.rows[key]["speeds"].append({"own": own, "dense": dense, "ratio": ratios})
                self.write()
                say(f"{key}, round {turn + 1}: {own}, ratio to dense {ratios}")

    def speed(self, key: str, folder: Path) -> dict[str, float]:
        """Tokens per second of each program."""
        (found,) = bench(
            [str(folder)],
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=NEW_TOKENS,
            rounds=1,
            threads=torch.get_num_threads(),
        )
        speeds = {"transformers": found.decode_tokens_per_second[1]}
        if llama_cpp := os.environ.get("LLAMA_CPP"):
            gguf = self.folder / f"{key.replace(' ', '-')}.gguf"
            if not gguf.exists():
                partial = gguf.with_name(f"partial-{gguf.name}")
                converter = [sys.executable, f"{llama_cpp}/convert_hf_to_gguf.py", str(folder)]
                output_of([*converter, "--outtype", "bf16", "--outfile", str(partial)])
                partial.replace(gguf)
            program = [f"{llama_cpp}/build/bin/llama-bench", "-m", str(gguf)]
            text = output_of([*program, *shlex.split("-n 64 -p 0 -t 1 -r 1 -o json")])
            speeds["llama.cpp"] = float(json.loads(text)[0]["avg_ts"])
        return speeds

    def table(self) -> str:
        """All rows in Markdown, by size and way."""
        texts = self.data["protocol"]["texts"]
        head = ["size", "way", "parameters in blocks"]
        head += [cell for text in texts for cell in (f"KL, {text}", "perplexity")]
        programs = ["transformers", "llama.cpp"]
        head += ["core seconds", *(f"{program}, times dense" for program in programs)]
        lines = [head, ["---:", "---", *["---:"] * (len(head) - 2)]]
        order = list(WAYS)
        rows = sorted(
            self.rows.values(),
            key=lambda row: (-row["size"], order.index(row["way"].removesuffix(RECOVERY))),
        )
        if rows:
            dense = [f"{rows[0]['scores'][text]['dense_perplexity']:.2f}" for text in texts]
            cells = [cell for each in dense for cell in ("", each)]
            lines.append(["", "dense", "100 %", *cells, "", *([""] * len(programs))])
        for row in rows:
            name = row["way"] + (f", {row['tokens']:,} tokens" if row["tokens"] else "")
            line = [f"{row['size']:g}", name, f"{100 * row['share']:.1f} %"]
            for score in (row["scores"][text] for text in texts):
                line.append(f"{score['kl']:.3f} ± {score['kl_stderr'] or 0:.3f}")
                line.append(f"{score['perplexity']:,.2f}")
            line.append(f"{row['seconds']:.0f}")
            for program in programs:
                found = [each["ratio"].get(program) for each in row.get("speeds", [])]
                found = [each for each in found if each is not None]
                line.append(f"{statistics.median(found):.2f}" if found else "")
            lines.append(line)
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def output_of(command: list[str]) -> str:
    """What a program prints.

    Raises:
        RuntimeError: it failed; ends with the last line that it wrote.
    """
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{shlex.join(command)} failed, exit status {done.returncode}: {last}")
    return done.stdout


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def sizes(skeleton: Skeleton) -> list[int]:
    """Parameters of each block."""
    blocks = [block.state_dict().values() for block in skeleton.blocks]
    return [sum(tensor.numel() for tensor in block) for block in blocks]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="checkpoint folder of the dense model")
    parser.add_argument("scratch", type=Path, help="folder for the smaller models")
    parser.add_argument("--data", type=Path, help="folder with local copies of the datasets")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.9, 0.75, 0.6])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--calibration", default="c4", help="a text, as prunus takes it")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens per calibration window")
    parser.add_argument("--tokens", type=int, default=0, help="of recovery; 0 for none")
    parser.add_argument("--texts", nargs="+", default=["wikitext2", "c4"], help="texts to score")
    parser.add_argument("--limit", type=int, default=8, help="windows of each text to score")
    parser.add_argument("--eval-seqlen", type=int, default=512, help="tokens per scored window")
    parser.add_argument("--speed", action="store_true", help="measure speed; makes no rows")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of speed per row")
    parser.add_argument("--json", type=Path, help="results; by default SCRATCH/structure.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    benchmark = Benchmark(given)
    if given.speed:
        benchmark.measure_speed()
    else:
        benchmark.describe()
        for size in given.sizes:
            for way in given.ways:
                benchmark.make_row(size, way)
                if given.tokens and way.endswith("+repair"):
                    benchmark.make_row(size, way + RECOVERY)
    print(benchmark.table())


if __name__ == "__main__":
    main()
