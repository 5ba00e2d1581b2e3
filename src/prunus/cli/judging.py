"""Verbs that run a model: what it is worth, how fast it is, what it writes."""

from __future__ import annotations

from typing import Annotated

import typer

from prunus.cli import arguments as arg
from prunus.cli.terminal import for_people, say, show, write_json

__all__ = ["bench", "doctor", "evaluate", "generate"]


def evaluate(
    model: arg.Model,
    perplexity: Annotated[
        str,
        typer.Option(metavar="TEXT,…", help="wikitext2, c4, ptb, python-docs or files, separated by commas."),
    ] = "wikitext2",
    seqlen: Annotated[int, typer.Option(help="Context: tokens per window.")] = 2048,
    limit: Annotated[int | None, typer.Option(help="Score the first LIMIT windows only.")] = None,
    batch: Annotated[int, typer.Option(help="Windows per forward pass.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")
    ] = "auto",
    device: arg.Device = "auto",
    data_dir: arg.DataDir = None,
    trust_remote_code: arg.Trust = False,
    json_file: arg.Json = None,
) -> None:
    """Score MODEL: perplexity in non-overlapping windows, as the papers do."""
    with for_people(json_file):
        from prunus.evaluation import perplexity as score
        from prunus.report.tables import perplexity_table

        texts = [text.strip() for text in perplexity.split(",")]
        results = [
            score(
                model,
                text,
                seqlen=seqlen,
                limit=limit,
                batch=batch,
                dtype=dtype,
                device=device,
                data_dir=data_dir,
                trust_remote_code=trust_remote_code,
            )
            for text in texts
        ]
        content = {"model": model, "perplexity": [result.as_dict() for result in results]}
        show(perplexity_table(results, model), json_file, content)


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Checkpoints, dense or packed.")],
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    rounds: Annotated[int, typer.Option(help="Processes per model, interleaved.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Torch threads.", show_default="torch's own")] = None,
    json_file: arg.Json = None,
) -> None:
    """Measure models side by side: file size, resident memory, prefill and decode tokens per second."""
    with for_people(json_file):
        from prunus.evaluation.speed import bench as measure
        from prunus.report.tables import speed_table

        found = measure(
            models,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            progress=say,
        )
        show(speed_table(found), json_file, [speed.as_dict() for speed in found])


def generate(
    model: arg.Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Where to stop at the latest.")] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    json_file: arg.Json = None,
) -> None:
    """Let MODEL, dense or packed, continue a prompt, as it comes."""
    with for_people(json_file):
        from prunus.evaluation.decoding import generate as stream

        pieces = []
        for piece in stream(model, prompt, max_new_tokens=max_new_tokens, chat=chat):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        write_json(json_file, {"model": model, "prompt": prompt, "text": "".join(pieces)})


def doctor(json_file: arg.Json = None) -> None:
    """Say which kernels run packed models on this machine, and why."""
    with for_people(json_file):
        from prunus.sparse import describe

        state = describe()
        for name, value in state.items():
            print(f"{name:24} {value}")
        write_json(json_file, state)
