"""The verb that wins quality back after pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunus.cli import arguments as arg
from prunus.cli.terminal import for_people, show

__all__ = ["recover"]


def recover(
    model: arg.Model,
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Folder for the recovered checkpoint; for lora, the adapter."
        ),
    ],
    mode: Annotated[
        str,
        typer.Option(
            help="lora: low-rank layers kept apart (peft). sparse-lora: low-rank updates of surviving weights, merged. "
            "masked: all surviving weights. block: block by block, without backpropagation through the model."
        ),
    ],
    text: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Training text: a source as for calibration, or a file.",
            show_default="c4",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Budget in tokens, counted as often as trained on.", show_default="131072"
        ),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget in minutes instead.")] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per window.", show_default="512")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per step.", show_default="1")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="At its peak; it falls along a cosine.",
            show_default="the mode's own, see docs/recovery.md",
        ),
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(help="Share of the budget over which the rate rises.", show_default="0.05"),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's.", show_default="0")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the text's order and fresh factors.", show_default="0")
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(help="Windows that are never trained on, to judge by.", show_default="8"),
    ] = None,
    evaluations: Annotated[
        int | None,
        typer.Option(help="Times that they are scored, each with a checkpoint.", show_default="8"),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Evaluations without a new best after which training stops.", show_default="3"
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="Learn from the logits of the dense model; in mode block from its blocks' outputs.",
            show_default="none; in mode block what was pruned",
        ),
    ] = None,
    distill_weight: Annotated[
        float | None,
        typer.Option(
            help="Share of the teacher in the loss; the rest is the text's.", show_default="1"
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of low-rank updates.", show_default="8")] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Low-rank updates are scaled by alpha / rank.", show_default="16"),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="Linears with low-rank updates, by the last part of their names.",
            show_default="lora: q_proj,v_proj; sparse-lora: all pruned linears",
        ),
    ] = None,
    passes: Annotated[
        int | None, typer.Option(help="Of mode block over its windows.", show_default="3")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of matrix products: auto, float32, bfloat16; what is trained is float32.",
            show_default="auto",
        ),
    ] = None,
    device: arg.Device = "auto",
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Budget of mode block.", show_default="what is free"),
    ] = None,
    data_dir: arg.DataDir = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Insist on resuming, or refuse to; by default a matching unfinished recovery is resumed.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace an earlier result of recover in OUT.")
    ] = False,
    rank_timeout: arg.RankTimeout = None,
    json_file: arg.Json = None,
) -> None:
    """Win quality of a pruned MODEL back by a short training that keeps its zeros. Killed, the same command goes on.

    Started by torchrun, the processes share the windows of every step: --batch must be at least their number.
    """
    values: dict[str, Any] = dict(locals())
    with for_people(json_file):
        from prunus.recovery import RecoveryOptions
        from prunus.recovery import recover as train
        from prunus.report.recovery_tables import recovery_table, show_recovery

        options = {name: values[name] for name in RecoveryOptions.model_fields if name != "mode"}
        if targets is not None:
            options["targets"] = tuple(name.strip() for name in targets.split(",") if name.strip())
        with show_recovery(f"{mode} {output}") as progress:
            record = train(
                model,
                output,
                mode,
                teacher=teacher,
                device=device,
                data_dir=data_dir,
                overwrite=overwrite,
                resume=resume,
                memory=memory,
                rank_timeout=rank_timeout,
                progress=progress,
                **options,
            )
        show(recovery_table(record), json_file, record.model_dump(mode="json"))
