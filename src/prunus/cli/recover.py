"""The verb that wins quality back after pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prunus.cli import arguments as arg
from prunus.cli.terminal import Counted, print_result, progress_console, user_errors

__all__ = ["recover"]

_TRAINING = "Training"
_LOW_RANK = "Mode lora"


def recover(
    model: arg.Model,
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Folder for the recovered checkpoint; in mode lora, the adapter."
        ),
    ],
    mode: Annotated[
        Literal["lora", "masked", "full", "scales"] | None,
        typer.Option(
            metavar="MODE",
            help="What to train. lora: low-rank layers of a peft adapter. masked: all weights "
            "except the pruned ones. full: all weights of a model without zeros, such as one of "
            "prunus shrink. scales: scales, steps, norms and biases of a compressed model, whose "
            "integers stay; the default there.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="Learn the logits of this dense model. Default: learn the text.",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Training text: a source as for calibration, or a file. Default: c4.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Budget in tokens; a token counts each time it is trained on. Default: 131072."
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Budget in minutes, in place of --tokens.")
    ] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window. Default: 512.")] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Windows per step. Default: as many as hold 1024 tokens."),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            help="Peak learning rate; it falls along a cosine. Default: that of the mode, 0.001 "
            "for lora, 0.00077 times the root mean square of the weights for masked "
            "and full, 0.002 relative to each tensor for scales.",
        ),
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            help="Fraction of the budget over which the learning rate rises. Default: 0.05.",
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(rich_help_panel=_TRAINING, help="Weight decay of AdamW. Default: 0."),
    ] = None,
    distill_weight: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            help="Weight of the teacher in the loss; the rest is for the text. Default: 1.",
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            help="Windows that are only evaluated, never trained on. Default: 8.",
        ),
    ] = None,
    evaluations: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            help="Evaluations of the held-out windows, each with a checkpoint. Default: 8.",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            help="Stop after this many evaluations without progress in training. Default: 3.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_TRAINING,
            help="Seed of the order of the text and of low-rank layers. Default: 0.",
        ),
    ] = None,
    bos: Annotated[
        arg.BosName | None,
        typer.Option(
            metavar="BOS",
            rich_help_panel=_TRAINING,
            help=arg.BOS_HELP,
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"] | None,
        typer.Option(
            metavar="DTYPE",
            rich_help_panel=_TRAINING,
            help="Dtype of matrix products: auto, float32 or bfloat16. Trained parameters are "
            "always float32. Default: auto.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(rich_help_panel=_LOW_RANK, help="Rank of the layers. Default: 8."),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_LOW_RANK,
            help="Scale the layers by alpha / rank. Default: 16.",
        ),
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            rich_help_panel=_LOW_RANK,
            help="Add layers to the linears with these last parts of their names. Default: "
            "q_proj,v_proj.",
        ),
    ] = None,
    device: arg.Device = "auto",
    data_dir: arg.DataDir = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Insist on resuming an unfinished recovery, or refuse to. Default: resume if the "
            "options are the same.",
        ),
    ] = None,
    overwrite: arg.Overwrite = False,
    rank_timeout: arg.RankTimeout = None,
    json_file: arg.Json = None,
) -> None:
    """Recover quality by a short training that keeps the zeros.

    In a compressed model it trains the scales, and the integers stay.

    A recovery that was stopped or killed continues when you give the same command again. Under
    torchrun, the processes split the windows of every step; --batch must be at least their number.
    """
    values: dict[str, Any] = dict(locals())
    with user_errors(json_file):
        from prunus.recovery import RecoveryOptions
        from prunus.recovery import recover as train
        from prunus.reporting.progress import show_recovery
        from prunus.reporting.tables import recovery_table

        options = {name: values[name] for name in RecoveryOptions.model_fields if name != "mode"}
        if target_modules is not None:
            names = (name.strip() for name in target_modules.split(","))
            options["target_modules"] = tuple(name for name in names if name)
        with show_recovery(f"{mode or 'scales'} {output}", progress_console()) as progress:
            steps = Counted(progress)
            record = train(
                model,
                output,
                mode,
                teacher=teacher,
                device=device,
                data_dir=data_dir,
                overwrite=overwrite,
                resume=resume,
                rank_timeout=rank_timeout,
                progress=steps,
                **options,
            )
        steps.log_if_none(output)
        print_result(recovery_table(record), json_file, record.model_dump(mode="json"))
