"""The verb that makes a model smaller: whole parts go, and an ordinary checkpoint remains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prunus.cli import arguments as arg
from prunus.cli.terminal import Counted, print_result, progress_console, user_errors

__all__ = ["shrink"]

_CALIBRATION = "Calibration"
_WIDTH = "Width"


def shrink(
    model: arg.Model,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the smaller checkpoint.")
    ],
    *,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="Of a mixture of experts: the share of the experts of each layer to remove, such "
            "as 0.25, or the number to keep, such as 6.",
        ),
    ] = None,
    saliency: Annotated[
        Literal["reap", "contribution"] | None,
        typer.Option(
            metavar="RULE",
            help="How to choose the experts to remove, by the norm of their outputs times the "
            "router's weight. reap removes those with the smallest mean over the tokens that "
            "choose them; contribution, those with the smallest sum. Default: reap.",
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="The share of the blocks to remove, such as 0.1, or the number to keep.",
        ),
    ] = None,
    block_rule: Annotated[
        Literal["kl", "cosine"] | None,
        typer.Option(
            metavar="RULE",
            help="How to choose the blocks to remove. kl removes the block whose absence changes "
            "the next-token distribution least, and measures again after each removal. cosine "
            "removes those that rotate the hidden states least (ShortGPT). Default: kl.",
        ),
    ] = None,
    width: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="The share of the channels of each MLP, also of each expert, and of the attention "
            "heads to remove, such as 0.25.",
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_WIDTH,
            help="Query heads to keep. Default: as --width says, as nearly as key-value groups "
            "allow. With all of them, only the MLPs become narrower.",
        ),
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_WIDTH,
            help="Key-value heads to keep. Default: as --width.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help="In place of shares: parameters=0.75 of those in blocks, memory=3GB for all "
            "tensors, or speed=1.3x (bytes that a token at batch 1 reads). Of models that meet it "
            "by fewer blocks, less width or both, the one of the smallest KL divergence is made.",
        ),
    ] = None,
    repair: Annotated[
        bool | None,
        typer.Option(
            "--repair/--no-repair",
            help="Train the blocks that changed, and all behind them, towards the outputs of MODEL "
            "on the calibration windows. Default: --repair.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            rich_help_panel=_CALIBRATION,
            help="A source of windows or a file, as for prunus prune. Default: c4.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_CALIBRATION,
            help="Number of calibration windows. Default: 128.",
        ),
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(
            metavar="N", rich_help_panel=_CALIBRATION, help="Tokens per window. Default: 2048."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_CALIBRATION,
            help="Seed of the random choice of windows. Default: 0.",
        ),
    ] = None,
    bos: Annotated[
        arg.BosName | None,
        typer.Option(metavar="BOS", rich_help_panel=_CALIBRATION, help=arg.BOS_HELP),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_CALIBRATION,
            help="Windows per forward pass. Default: as many as hold about 4096 tokens.",
        ),
    ] = None,
    dtype: Annotated[
        arg.DtypeName | None,
        typer.Option(
            metavar="DTYPE",
            rich_help_panel=arg.ADVANCED,
            help="Dtype of the computation: auto, float32, bfloat16 or float16. The checkpoint "
            "keeps its own. Default: auto.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="FILE.toml",
            rich_help_panel=arg.ADVANCED,
            help="File with these options; flags override it.",
        ),
    ] = None,
    device: arg.Device = "auto",
    memory: arg.Memory = None,
    data_dir: arg.DataDir = None,
    overwrite: arg.Overwrite = False,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Insist on resuming an unfinished run, or refuse to. Default: resume if the "
            "options are the same.",
        ),
    ] = None,
    json_file: arg.Json = None,
    trust_remote_code: arg.Trust = False,
    rank_timeout: arg.RankTimeout = None,
) -> None:
    """Make MODEL smaller by removing whole parts.

    OUT is an ordinary checkpoint. Its configuration is smaller too, so plain transformers and all
    else that loads the family load it. A run that was stopped or killed continues when you give the
    same command again.
    """
    values: dict[str, Any] = dict(locals())
    with user_errors(json_file):
        from prunus.hardware.sizes import parse_bytes
        from prunus.reporting.progress import show_pruning
        from prunus.reporting.structure_section import structure_table
        from prunus.runs.options import RunOptions
        from prunus.structure.recipe import StructureRecipe, load_structure_recipe
        from prunus.structure.run import shrink_by_recipe

        given = {name: values[name] for name in StructureRecipe.model_fields}
        chosen = load_structure_recipe(recipe, given)
        with show_pruning(f"shrink {output}", progress_console()) as progress:
            steps = Counted(progress)
            options = RunOptions(
                device=device,
                memory=parse_bytes(memory) if memory is not None else None,
                data=data_dir,
                trust_remote_code=trust_remote_code,
                announce=progress,
                rank_timeout=rank_timeout,
            )
            record = shrink_by_recipe(
                model,
                output,
                chosen,
                options,
                overwrite=overwrite,
                resume=resume,
                progress=steps,
            )
        steps.log_if_none(output)
        print_result(structure_table(record), json_file, record.model_dump(mode="json"))
