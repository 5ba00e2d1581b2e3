"""Verbs that run a model: what it is worth, how fast it is, what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.cli import arguments as arg
from prunus.cli.terminal import for_people, say, show, write_json

__all__ = ["bench", "doctor", "evaluate", "generate"]


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL…", help="Checkpoints, dense or packed, adapters, or hub ids."
        ),
    ],
    perplexity: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT,…",
            help="wikitext2, c4, ptb, python-docs or files, separated by commas.",
            show_default="wikitext2 where no tasks are given",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,…",
            help="Tasks of lm-eval, separated by commas; paper7 stands for boolq, rte, hellaswag, winogrande, "
            "arc_easy, arc_challenge, openbookqa.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Image classifiers: top-1 accuracy on a folder with a subfolder of images per class.",
        ),
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Worked examples per prompt of a task.",
            show_default="the task's own, mostly 0",
        ),
    ] = None,
    seqlen: Annotated[int, typer.Option(help="Context: tokens per window of a text.")] = 2048,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Score the first LIMIT windows of a text, rows of a task, or so many images, only."
        ),
    ] = None,
    batch: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Windows, prompts or images at once; auto is 1 window, 8 prompts or what a card holds, 16 images.",
        ),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")
    ] = "auto",
    device: arg.Device = "auto",
    memory: arg.Memory = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Perplexity: take all windows through one block before the next is read, or load the whole model. "
            "The figures are the same.",
            show_default="streams what does not fit in --memory",
        ),
    ] = None,
    data_dir: arg.DataDir = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar="PRUNUS_CACHE",
            help="Where results are kept and found again by the content of the checkpoint.",
            show_default="prunus/results in the user's cache",
        ),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Compute everything anew and keep nothing.")
    ] = False,
    trust_remote_code: arg.Trust = False,
    rank_timeout: arg.RankTimeout = None,
    json_file: arg.Json = None,
) -> None:
    """Score MODELs side by side: perplexity as the papers compute it, accuracy on tasks through lm-eval, or on images.

    Started by torchrun, the processes share windows and rows, each with the whole model.
    """
    with for_people(json_file):
        from prunus.distributed import process_group
        from prunus.evaluation import (
            check_text,
            default_cache_folder,
            find_folder,
            prepare_tasks,
            side_by_side,
        )
        from prunus.evaluation import perplexity as score
        from prunus.report.evaluation_tables import evaluation_tables

        if images is not None:
            if perplexity is not None or tasks is not None:
                raise ValueError(
                    "--images is for image classifiers, which read no text: give it alone"
                )
            _score_images(
                models, images, limit, _batch(batch), dtype, device, trust_remote_code, json_file
            )
            return
        shared: dict[str, Any] = {
            "limit": limit,
            "dtype": dtype,
            "device": device,
            "data_dir": data_dir,
            "trust_remote_code": trust_remote_code,
            "cache": None if no_cache else cache or default_cache_folder(),
        }
        at_once = _batch(batch)
        models = list(dict.fromkeys(models))
        wanted = "wikitext2" if perplexity is None and tasks is None else perplexity
        texts = (
            [] if wanted is None else [text.strip() for text in wanted.split(",") if text.strip()]
        )
        if wanted is not None and not texts:
            raise ValueError("no texts are named; give some, such as wikitext2")
        for text in texts:
            check_text(text, data_dir)
        for model in models:
            find_folder(model)
        job = (
            None
            if tasks is None
            else prepare_tasks(models, tasks, fewshot=fewshot, batch=at_once, **shared)
        )
        windows = 1 if isinstance(at_once, str) else at_once
        with process_group(rank_timeout) as ranks:
            scores = {
                model: [
                    score(
                        model,
                        text,
                        seqlen=seqlen,
                        batch=windows,
                        memory=memory,
                        stream=stream,
                        ranks=ranks,
                        **shared,
                    )
                    for text in texts
                ]
                for model in models
            }
            results = [] if job is None else job.run(say, ranks)
        show(evaluation_tables(scores, results), json_file, side_by_side(scores, results))


def _score_images(
    models: list[str],
    folder: Path,
    limit: int | None,
    batch: int | str,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    json_file: Path | None,
) -> None:
    from prunus.evaluation import image_accuracy
    from prunus.report.tables import images_table

    scores = image_accuracy(
        list(dict.fromkeys(models)),
        folder,
        limit=limit,
        batch=16 if isinstance(batch, str) else batch,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    show(images_table(scores), json_file, [score.as_dict() for score in scores])


def _batch(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise ValueError(f"batch must be auto or a number, not {text!r}")
    return text if text == "auto" else int(text)


def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL…", help="Checkpoints, dense or packed.")
    ],
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    rounds: Annotated[int, typer.Option(help="Processes per model, interleaved.")] = 3,
    threads: Annotated[
        int | None, typer.Option(help="Torch threads.", show_default="torch's own")
    ] = None,
    dense_kernel: Annotated[
        bool,
        typer.Option(
            "--dense-kernel", help="Measure the first model with prunus's dense kernel too."
        ),
    ] = False,
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
            dense_kernel=dense_kernel,
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
        from prunus.evaluation.generation import generate as stream

        pieces = []
        for piece in stream(model, prompt, max_new_tokens=max_new_tokens, chat=chat):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        write_json(json_file, {"model": model, "prompt": prompt, "text": "".join(pieces)})


def doctor(json_file: arg.Json = None) -> None:
    """Say which kernels run packed models on this machine, and why."""
    with for_people(json_file):
        from prunus.packed import describe

        state = describe()
        for name, value in state.items():
            print(f"{name:24} {value}")
        write_json(json_file, state)
