"""Size and speed of a model: bytes on disk and in memory, tokens per second.

Each measurement runs in a process of its own, so that memory of one model does not count for
another. The models take turns, so that a computer that slows down slows down all models equally.
`python -m prunus.evaluation.speed FOLDER OPTIONS` is such a process.
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

from prunus.evaluation.inspection import file_bytes
from prunus.evaluation.model_input import find_model
from prunus.evaluation.options import SpeedOptions
from prunus.evaluation.records import EvaluationRecord
from prunus.hardware.memory import process_memory
from prunus.model.adapter import is_adapter
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.loading import check_architecture, load_model


@dataclass(frozen=True)
class Speed(EvaluationRecord):
    """Size and speed of one model. Measurements are (minimum, median, maximum) over all rounds."""

    #: Name of the model.
    model: str
    #: Size of its safetensors; an adapter's base is included.
    file_bytes: int
    #: Resident memory of the process after generation, minus that before the model was loaded.
    resident_bytes: tuple[float, float, float]
    #: Prompt tokens, divided by the time to the first new token.
    prefill_tokens_per_second: tuple[float, float, float]
    #: New tokens after the first, divided by the time that they took.
    decode_tokens_per_second: tuple[float, float, float]


def bench(
    models: Sequence[str], *, progress: Callable[[str], None] | None = None, **options: Any
) -> list[Speed]:
    """Measure size and speed of models side by side, in turns.

    Args:
        models: Folders or hub ids: dense, packed or adapters.
        progress: Called with a line of text before each measurement.
        **options: See `SpeedOptions`.

    Returns:
        One entry per model.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: An option or a model is unusable.
        RuntimeError: A measurement failed.
    """
    chosen = SpeedOptions.read(None, options)
    folders = [_folder(model) for model in models]
    measurements: list[list[dict[str, float]]] = [[] for _ in models]
    for number in range(chosen.rounds):
        for rows, name, folder in zip(measurements, models, folders, strict=True):
            if progress is not None:
                progress(f"round {number + 1} of {chosen.rounds}: {name}")
            rows.append(_measure_in_subprocess(folder, chosen))
    values = [{key: [row[key] for row in rows] for key in rows[0]} for rows in measurements]
    return [
        Speed(
            model=name,
            file_bytes=file_bytes(folder),
            **{key: (min(x), statistics.median(x), max(x)) for key, x in measured.items()},
        )
        for name, folder, measured in zip(models, folders, values, strict=True)
    ]


def _folder(model: str) -> Path:
    """The folder of a model, whose configuration and headers can be read."""
    folder = find_model(model).folder
    assert folder is not None, "a model that is named has a folder"
    if not is_adapter(folder):
        Checkpoint(folder)
    return folder


def _measure(folder: Path, options: SpeedOptions) -> dict[str, float]:
    """Measure one model in this process; see `Speed` for the results."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # Imported first, because the memory of code is no part of the model's size.
    check_architecture(folder)
    before = process_memory()
    loaded = load_model(folder)
    vocabulary = loaded.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, options.prompt_tokens), generator=generator)

    # Without an end token every round decodes the same number of tokens. A minimum length takes
    # milliseconds per token, because it changes the logits of the whole vocabulary.
    loaded.generation_config.eos_token_id = None

    def seconds(tokens: int) -> float:
        """The time to generate this number of new tokens."""
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
        assert whole.shape[1] == options.prompt_tokens + tokens, "generation ended early"
        return took

    seconds(2)  # warm-up: kernels are selected, and pages of the file are read
    first = min(seconds(1) for _ in range(2))
    whole = seconds(options.new_tokens)
    return {
        "resident_bytes": float(process_memory() - before),
        "prefill_tokens_per_second": options.prompt_tokens / first,
        "decode_tokens_per_second": (options.new_tokens - 1) / (whole - first),
    }


def _measure_in_subprocess(folder: Path, options: SpeedOptions) -> dict[str, float]:
    """Run `_measure` in a new process, which writes its result as JSON."""
    command = [sys.executable, "-m", __name__, str(folder), options.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring {folder} failed: {last}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), SpeedOptions(**json.loads(sys.argv[2])))))
