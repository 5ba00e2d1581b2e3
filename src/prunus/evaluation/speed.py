"""Size and speed of a model: bytes on disk and in memory, tokens per second.

Each measurement runs in a process of its own, so that memory of one model does not count for
another. The models take turns, so that a computer that slows down slows down all models equally.
`python -m prunus.evaluation.speed MODEL …` is such a process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass

from prunus.evaluation.options import SpeedOptions
from prunus.evaluation.records import EvaluationRecord
from prunus.evaluation.size import file_bytes as model_bytes
from prunus.hardware.memory import resident_memory
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.loading import check_architecture, load_model
from prunus.packed import use_dense_kernel, use_fast_decoding

_MEASUREMENTS = ("resident_bytes", "prefill_tokens_per_second", "decode_tokens_per_second")


@dataclass(frozen=True)
class Speed(EvaluationRecord):
    """Size and speed of one model. Measurements are (minimum, median, maximum) over all rounds.

    Attributes:
        model: the name that was given.
        file_bytes: size of its safetensors; an adapter's base is included.
        resident_bytes: resident memory of the process after generation, minus that before the model
            was loaded.
        prefill_tokens_per_second: prompt tokens, divided by the time to the first new token.
        decode_tokens_per_second: new tokens after the first, divided by the time that they took.
    """

    model: str
    file_bytes: int
    resident_bytes: tuple[float, float, float]
    prefill_tokens_per_second: tuple[float, float, float]
    decode_tokens_per_second: tuple[float, float, float]


def bench(
    models: Sequence[str], *, progress: Callable[[str], None] | None = None, **options: Any
) -> list[Speed]:
    """Measure models side by side, in turns.

    Args:
        **options: see `SpeedOptions`.

    Raises:
        ValueError: an option is out of range.
        FileNotFoundError: a model does not exist.
        RuntimeError: a process failed; the message ends with the last line that it wrote.
    """
    given = SpeedOptions.read(None, options)
    names, folders = list(models), [resolve_folder(model) for model in models]
    with_kernel = [False] * len(names)
    if given.dense_kernel:
        names.insert(1, f"{names[0]}, dense kernel")
        folders.insert(1, folders[0])
        with_kernel.insert(1, True)
    found: list[list[dict[str, float]]] = [[] for _ in names]
    for turn in range(given.rounds):
        for position, folder in enumerate(folders):
            if progress is not None:
                progress(f"round {turn + 1} of {given.rounds}: {names[position]}")
            found[position].append(_measure_in_subprocess(folder, given, with_kernel[position]))
    return [
        Speed(
            model=model,
            file_bytes=model_bytes(folder),
            **{name: _min_median_max([row[name] for row in rows]) for name in _MEASUREMENTS},
        )
        for model, folder, rows in zip(names, folders, found, strict=True)
    ]


def measure(
    folder: Path, prompt_tokens: int, new_tokens: int, dense_kernel: bool = False, seed: int = 0
) -> dict[str, float]:
    """Measure one model in this process; see `bench` for arguments, `Speed` for results."""
    # Imported first, because the memory of code is no part of the model's size.
    check_architecture(folder)
    before = resident_memory()
    loaded = load_model(folder)
    if dense_kernel:
        use_dense_kernel(loaded)
        use_fast_decoding(loaded)
    vocabulary = loaded.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (1, prompt_tokens), generator=generator)

    # Without an end token every round decodes the same number of tokens. A minimum length would do
    # so as well, but it changes the logits of the whole vocabulary for every token, which takes
    # milliseconds.
    loaded.generation_config.eos_token_id = None

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            whole = loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        took = time.perf_counter() - started
        assert whole.shape[1] == prompt_tokens + tokens, "generation ended early"
        return took

    seconds(2)  # warm-up: kernels are selected, and pages of the file are read
    first = min(seconds(1) for _ in range(2))
    whole = seconds(new_tokens)
    return {
        "resident_bytes": float(resident_memory() - before),
        "prefill_tokens_per_second": prompt_tokens / first,
        "decode_tokens_per_second": (new_tokens - 1) / (whole - first),
    }


def _measure_in_subprocess(
    folder: Path, options: SpeedOptions, dense_kernel: bool
) -> dict[str, float]:
    """Run `measure` in a new process, which writes its result as JSON."""
    numbers = (options.prompt_tokens, options.new_tokens, options.threads or 0, int(dense_kernel))
    command = [sys.executable, "-m", __name__, str(folder), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring {folder} failed: {last}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _min_median_max(values: list[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


def _main() -> None:
    """One measurement, with the arguments that `_measure_in_subprocess` gives."""
    folder = Path(sys.argv[1])
    prompt_tokens, new_tokens, threads, dense_kernel = map(int, sys.argv[2:6])
    if threads:
        torch.set_num_threads(threads)
    print(json.dumps(measure(folder, prompt_tokens, new_tokens, bool(dense_kernel))))


if __name__ == "__main__":
    _main()
