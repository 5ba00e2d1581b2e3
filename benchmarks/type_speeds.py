"""How long llama.cpp takes for a weight of each GGUF type, for `--fast-on`.

    python benchmarks/type_speeds.py MODEL.gguf SCRATCH --llama-cpp DIR --json FILE

MODEL is a GGUF file whose widths 256 divides. For each type that prunus writes, the script makes a
file with the fields and shapes of MODEL, and all matrices in that type: a few rows of random
weights over and over, as speed does not depend on them. `llama-bench` measures them in turn, for
some rounds, and the best of the rounds counts: other work on the machine only slows a program down.
DIR is the folder of llama.cpp's source with its programs in build/bin.

The result has nanoseconds per weight: the time of a token divided by the weights of all matrices.
It contains what attention takes, which is the same for all types and small at 32 tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from figures import save

from prunus.formats.gguf.file import GgufFile, write_gguf
from prunus.formats.gguf.header import StoredTensor
from prunus.formats.gguf.types import TYPES, GgufType
from prunus.rounding.group_fits import round_to_nearest

ROWS = 16
PROMPT, TOKENS = 128, 32


@functools.cache
def few_rows(columns: int, kind: GgufType) -> torch.Tensor:
    """The bytes of some rows of random weights in a type."""
    generator = torch.Generator().manual_seed(0)
    rows_OI = 0.02 * torch.randn((ROWS, columns), generator=generator)
    return round_to_nearest(rows_OI, kind, None).data_OB


def content(shape: tuple[int, ...], kind: GgufType) -> torch.Tensor:
    """The bytes of a matrix of this shape in a type, whose rows repeat."""
    rows = math.prod(shape[:-1])
    return few_rows(shape[-1], kind).repeat(-(-rows // ROWS), 1)[:rows]


def write_in_type(model: GgufFile, kind: GgufType, target: Path) -> None:
    """Write a file of the shapes of a model, with all matrices in one type."""
    stored = []
    for name, tensor in model.tensors.items():
        shape = tuple(map(int, reversed(tensor.shape)))
        if len(shape) > 1:
            nbytes = kind.nbytes_of(math.prod(shape))
            read = partial(content, shape, kind)
            stored.append(StoredTensor(name, shape, kind.number, nbytes, read))
        else:
            read = partial(model.read, name)
            stored.append(StoredTensor(name, shape, 0, 4 * math.prod(shape), read))
    write_gguf(target, model.fields(), stored)


def tokens_per_second(bench: Path, file: Path, threads: int) -> tuple[float, float]:
    """Tokens per second of a prompt, and of decoding."""
    command = [bench, "-m", file, "-p", PROMPT, "-n", TOKENS, "-r", 1, "-t", threads, "-o", "json"]
    done = subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True
    )
    prompt, decode = json.loads(done.stdout)
    return float(prompt["avg_ts"]), float(decode["avg_ts"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path, help="folder for one file per type")
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--types", default=",".join(TYPES))
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    model, files = GgufFile.open(options.model), {}
    matrices = [x for x in model.tensors.values() if len(x.shape) > 1]
    weights = sum(int(x.n_elements) for x in matrices)
    for name in options.types.split(","):
        files[name] = options.scratch / f"{name}.gguf"
        if not files[name].exists():
            write_in_type(model, TYPES[name], files[name])
    bench = options.llama_cpp / "build" / "bin" / "llama-bench"
    best: dict[str, tuple[float, float]] = dict.fromkeys(files, (0.0, 0.0))
    for _ in range(options.rounds):
        for name, file in files.items():
            prompt, decode = tokens_per_second(bench, file, options.threads)
            best[name] = max(best[name][0], prompt), max(best[name][1], decode)
            print(time.strftime("%H:%M:%S"), name, f"{prompt:.1f} {decode:.1f}", flush=True)
    command = (
        "python benchmarks/type_speeds.py MODEL.gguf SCRATCH --llama-cpp DIR "
        f"--json FILE --rounds {options.rounds} --threads {options.threads}"
    )
    figures: dict[str, Any] = {
        "weights": weights,
        "nanoseconds per weight": {
            name: {
                "decode": round(1e9 / decode / weights, 5),
                "prompt": round(1e9 / prompt / weights, 5),
            }
            for name, (prompt, decode) in best.items()
        },
    }
    save(options.json, figures, command)


if __name__ == "__main__":
    main()
