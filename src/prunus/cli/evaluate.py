"""Verbs that measure a model: `eval` and `bench`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prunus.cli import arguments as arg
from prunus.cli.flags import opt, with_flags
from prunus.cli.terminal import is_quiet, note, print_result, user_errors
from prunus.options.declaration import ADVANCED
from prunus.runs.options import BOS, BosName, RunOptions

__all__ = ["bench", "evaluate"]

#: As `prunus.evaluation.Protocol`, which imports torch.
ProtocolName = Literal["papers", "llama.cpp"]
#: Images per forward pass where `--batch` is auto.
_IMAGES_AT_ONCE = 16


@with_flags(RunOptions, only=("device", "data", "memory", "trust_remote_code", "rank_timeout"))
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL…", help="Checkpoints, dense or packed, adapters, or hub ids."
        ),
    ],
    *,
    perplexity: Annotated[
        str | None,
        opt(
            "Texts, separated by commas: wikitext2, c4, ptb, python-docs or files. "
            "Default: wikitext2, if no tasks are given.",
            "TEXT,…",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        opt(
            "Tasks of lm-eval, separated by commas. paper7 stands for boolq, rte, "
            "hellaswag, winogrande, arc_easy, arc_challenge and openbookqa.",
            "TASK,…",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        opt("For image classifiers: a folder with one subfolder of images per class.", "DIR"),
    ] = None,
    reference: Annotated[
        str | None,
        opt(
            "Compare the predictions on each text with this model, as a rule the dense "
            "one: KL divergence, same most likely token, ratio of perplexities. It runs "
            "once per text.",
            "MODEL",
        ),
    ] = None,
    seqlen: Annotated[
        int | None,
        opt("Tokens per window of a text. Default: 2048, or 512 with --protocol llama.cpp.", "N"),
    ] = None,
    samples: Annotated[
        int | None,
        opt("Score only the first N windows of each text.", "N"),
    ] = None,
    limit: Annotated[
        int | None,
        opt("Score only N rows of each task, or N images.", "N"),
    ] = None,
    fewshot: Annotated[
        int | None,
        opt("Solved examples in each prompt of a task. Default: as the task says, mostly 0.", "N"),
    ] = None,
    json_file: arg.Json = None,
    batch: Annotated[
        str,
        opt(
            "Windows, prompts or images per forward pass. auto: 1 window, 8 prompts (on a "
            "GPU as many as fit), 16 images. Default: auto.",
            "N|auto",
            panel=ADVANCED,
        ),
    ] = "auto",
    dtype: arg.ComputeDtype = "auto",
    protocol: Annotated[
        ProtocolName,
        opt(
            "Which tokens of a window are scored. papers: all but the first. llama.cpp: "
            "those of the second half, as its perplexity tool does. Default: papers.",
            "PROTOCOL",
            panel=ADVANCED,
        ),
    ] = "papers",
    bos: Annotated[BosName, opt(f"{BOS.help} Default: auto.", "BOS", panel=ADVANCED)] = "auto",
    stream: Annotated[
        bool | None,
        opt(
            "For perplexity, load one block at a time, or load the whole model. The "
            "figures are the same. Default: stream what does not fit in --memory, the "
            "reference included.",
            names=("--stream/--no-stream",),
            panel=ADVANCED,
        ),
    ] = None,
    **options: Any,
) -> None:
    """Score models by perplexity, tasks of lm-eval, or images.

    Several models are shown side by side, with the differences to the first. Perplexity is that
    of the papers; --reference also says how far each model is from the dense one. Under torchrun
    the processes share windows and rows; each holds the whole model.
    """
    with user_errors(json_file):
        from prunus.distributed import process_group
        from prunus.evaluation.comparison import side_by_side
        from prunus.evaluation.model_input import check_same_vocabulary, find_folder, find_model
        from prunus.evaluation.perplexity import perplexity as measure_perplexity
        from prunus.evaluation.records import PerplexityResult
        from prunus.evaluation.reference import Reference
        from prunus.evaluation.size import stored_size
        from prunus.evaluation.task_runner import prepare_tasks
        from prunus.evaluation.text import check_text
        from prunus.reporting.evaluation_sections import evaluation_section

        work = RunOptions.read(None, options)
        models = list(dict.fromkeys(models))
        batch_size = _parse_batch(batch)
        if images is not None:
            if (perplexity, tasks, reference, samples) != (None,) * 4:
                raise ValueError(
                    "--images scores image classifiers, which read no text: drop --perplexity, "
                    "--tasks, --reference and --samples"
                )
            _score_images(models, images, limit, batch_size, dtype, work, json_file)
            return
        trust = work.trust_remote_code
        shared: dict[str, Any] = {
            "dtype": dtype,
            "device": work.device,
            "data": work.data,
            "trust_remote_code": trust,
        }
        texts = _chosen_texts(perplexity, tasks)
        if reference is not None and not texts:
            raise ValueError(
                "--reference compares predictions on a text, and --tasks alone scores none: add "
                "--perplexity TEXT, such as wikitext2"
            )
        # Everything is checked before the first model is loaded.
        for text in texts:
            check_text(text, work.data)
        for model in models:
            found = find_model(model, trust)
            if reference is not None:
                check_same_vocabulary(found, find_model(reference, trust))
        task_run = (
            None
            if tasks is None
            else prepare_tasks(
                models, tasks, fewshot=fewshot, limit=limit, batch=batch_size, **shared
            )
        )
        windows = 1 if isinstance(batch_size, str) else batch_size
        with process_group(work.rank_timeout) as ranks, contextlib.ExitStack() as stack:
            scores: dict[str, list[PerplexityResult]] = {model: [] for model in models}
            dense = None if reference is None else stack.enter_context(Reference(reference))
            # Text by text, because the reference keeps what it has computed for one text.
            for text in texts:
                for model in models:
                    scores[model].append(
                        measure_perplexity(
                            model,
                            text,
                            reference=dense,
                            protocol=protocol,
                            bos=bos,
                            seqlen=seqlen,
                            samples=samples,
                            batch=windows,
                            memory=work.memory,
                            stream=stream,
                            ranks=ranks,
                            progress=not is_quiet(),
                            **shared,
                        )
                    )
            stack.close()
            results = [] if task_run is None else task_run.run(note, ranks)
        sizes = {model: stored_size(find_folder(model), trust) for model in models}
        content = side_by_side(scores, results, sizes)
        print_result(evaluation_section(content), json_file, content)


def _chosen_texts(perplexity: str | None, tasks: str | None) -> list[str]:
    if perplexity is None:
        return ["wikitext2"] if tasks is None else []
    texts = [text.strip() for text in perplexity.split(",") if text.strip()]
    if not texts:
        raise ValueError("--perplexity names no texts; give some, such as wikitext2")
    return texts


def _score_images(
    models: list[str],
    folder: Path,
    limit: int | None,
    batch: int | str,
    dtype: str,
    work: RunOptions,
    json_file: Path | None,
) -> None:
    from prunus.evaluation.images import image_accuracy
    from prunus.reporting.tables import images_table

    scores = image_accuracy(
        models,
        folder,
        limit=limit,
        batch=_IMAGES_AT_ONCE if isinstance(batch, str) else batch,
        dtype=dtype,
        device=work.device,
        trust_remote_code=work.trust_remote_code,
    )
    print_result(images_table(scores), json_file, [score.as_dict() for score in scores])


def _parse_batch(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise ValueError(f"batch must be auto or a number, not {text!r}")
    return text if text == "auto" else int(text)


def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL…", help="Checkpoints, dense or packed.")
    ],
    prompt_tokens: Annotated[
        int,
        opt("Length of the prompt. Default: 128 tokens.", "N"),
    ] = 128,
    new_tokens: Annotated[int, opt("Tokens to decode. Default: 64.", "N")] = 64,
    rounds: Annotated[
        int,
        opt("Processes per model; the models take turns. Default: 3.", "N"),
    ] = 3,
    threads: Annotated[
        int | None,
        opt("Torch threads. Default: as torch chooses.", "N"),
    ] = None,
    dense_kernel: Annotated[
        bool,
        opt("Also measure the first model with prunus's dense kernel.", names=("--dense-kernel",)),
    ] = False,
    json_file: arg.Json = None,
) -> None:
    """Measure file size, memory, and prefill and decode speed.

    Several models are shown side by side. Each measurement runs in a process of its own.
    """
    with user_errors(json_file):
        from prunus.evaluation.speed import bench as measure_speed
        from prunus.reporting.evaluation_sections import speed_section

        found = measure_speed(
            models,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            dense_kernel=dense_kernel,
            progress=note,
        )
        content = [speed.as_dict() for speed in found]
        print_result(speed_section(content), json_file, content)
