"""The options of a recipe on the command line: one for every field, declared here and nowhere else."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["OPTIONS", "chosen_recipe", "takes_recipe"]


def _share(text: str) -> float:
    """A sparsity as given; what is no number is bad usage, with a word on what was probably meant."""
    try:
        return float(text)
    except ValueError:
        hint = f"; is it --pattern {text}?" if ":" in text else ""
        raise typer.BadParameter(f"{text!r} is no share such as 0.5{hint}") from None


#: Field of a recipe -> type and help of its option, in the order of --help. What is not given stays None.
OPTIONS: dict[str, Any] = {
    "preset": Annotated[
        str | None,
        typer.Option(help="fast (wanda), balanced or best. Explicit options override the preset."),
    ],
    "method": Annotated[
        str | None,
        typer.Option(
            help="magnitude, wanda, wanda-variant, ria, sparsegpt, obs or alps.",
            show_default="wanda",
        ),
    ],
    "sparsity": Annotated[
        float | None,
        typer.Option(
            parser=_share,
            metavar="<float>",
            help="Share of each linear's weights that goes, in [0, 1).",
            show_default="0.5",
        ),
    ],
    "pattern": Annotated[
        str | None,
        typer.Option(
            metavar="N:M",
            help="Keep at most N of every M consecutive inputs (the original code counts zeros; 2:4 and 4:8 agree).",
            show_default="unstructured",
        ),
    ],
    "group": Annotated[
        str | None,
        typer.Option(
            help="Who competes: row, layer, column, or a number of rows.",
            show_default="the method's own, as published",
        ),
    ],
    "calibration": Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="c4, wikitext2, ptb, python-docs, self, or a file: .txt .jsonl .jsonl.gz .parquet, "
            ".safetensors with input_ids; for image classifiers a folder of images.",
            show_default="c4",
        ),
    ],
    "samples": Annotated[int | None, typer.Option(help="Calibration windows.", show_default="128")],
    "seqlen": Annotated[int | None, typer.Option(help="Tokens per window.", show_default="2048")],
    "seed": Annotated[int | None, typer.Option(help="Of the calibration draw.", show_default="0")],
    "batch": Annotated[
        int | None,
        typer.Option(help="Windows per forward pass.", show_default="about 4096 tokens' worth"),
    ],
    "dtype": Annotated[
        str | None,
        typer.Option(
            help="Of the computation: auto, float32, bfloat16, float16; the checkpoint keeps its own.",
            show_default="auto",
        ),
    ],
    "propagate": Annotated[
        str | None,
        typer.Option(
            help="linear: one pass, each linear sees all pruning before it; block: as the original, two passes "
            "(weight updates in its order of operations, on one thread).",
            show_default="linear",
        ),
    ],
    "head": Annotated[
        bool | None,
        typer.Option("--head", help="Prune the output head too; refused where it is tied."),
    ],
    "only": Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Prune only linears with such names; may be repeated."),
    ],
    "ignore": Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Leave linears with such names dense; may be repeated."),
    ],
    "min_expert_tokens": Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="In mixtures of experts: measure an expert that fewer than N calibration tokens choose as if all had "
            "chosen it; 0 never does.",
            show_default="32; 512 for methods that need a Gram matrix",
        ),
    ],
    "mask_from": Annotated[
        str | None,
        typer.Option(help="For obs: mask from wanda or magnitude.", show_default="wanda"),
    ],
    "mask_order": Annotated[
        str | None,
        typer.Option(
            help="For obs: mask fixed before the update, or blockwise (anew every 128 columns).",
            show_default="before",
        ),
    ],
    "damping": Annotated[
        float | None,
        typer.Option(
            help="For methods that invert a Gram: share of its mean diagonal.",
            show_default="0.01; by the number of tokens for alps, swaps and lsq",
        ),
    ],
    "ria_power": Annotated[
        float | None, typer.Option(help="For ria: exponent of the input norms.", show_default="0.5")
    ],
    "iterations": Annotated[int | None, typer.Option(help="For alps.", show_default="12")],
    "refine": Annotated[
        str | None,
        typer.Option(
            help="Look over the mask of any method: dsnot (until mean outputs are right) or swaps (as long as they "
            "lower the output error).",
            show_default="none",
        ),
    ],
    "refine_steps": Annotated[
        int | None,
        typer.Option(help="Maximum steps of --refine.", show_default="50 for dsnot, 100 for swaps"),
    ],
    "weight_update": Annotated[
        str | None,
        typer.Option(
            help="least-squares: fit the kept weights to the mask, whatever method it is from.",
            show_default="none",
        ),
    ],
    "dense_weight": Annotated[
        str | None,
        typer.Option(
            help="Share of the dense model in the outputs that updated weights approximate, 0 to 1, "
            "or auto: chosen per linear on held-out windows. Above 0 the dense model runs as well.",
            show_default="0",
        ),
    ],
    "reconstruct": Annotated[
        str | None,
        typer.Option(
            help="Train pruned blocks towards the dense model, with the masks fixed: none, last "
            "(the last block, towards the dense logits) or all.",
            show_default="none",
        ),
    ],
    "reconstruct_epochs": Annotated[
        int | None,
        typer.Option(
            help="Epochs of block reconstruction.",
            show_default="by the number of tokens, at most 7",
        ),
    ],
    "reconstruct_lr": Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate of block reconstruction.",
            show_default="0.7 % of the RMS of a tensor's weights, 0.2 % for the last block",
        ),
    ],
    "permute": Annotated[
        bool | None,
        typer.Option(
            "--permute",
            help="With N:M, let inputs change places so that groups keep more, inside MLPs and heads, folded into the "
            "weights that write them. The result is an ordinary checkpoint.",
        ),
    ],
    "allocation": Annotated[
        str | None,
        typer.Option(
            help="Who is to be sparser: uniform (all alike), owl (few outliers), dlp (high medians), arithmetic (the "
            "later), search (whose pruning alone changes the outputs least).",
            show_default="uniform",
        ),
    ],
    "allocation_by": Annotated[
        str | None,
        typer.Option(
            help="What gets a sparsity of its own: block or linear.", show_default="block"
        ),
    ],
    "allocation_spread": Annotated[
        float | None,
        typer.Option(
            help="For owl, dlp, arithmetic: half the distance from the densest to the sparsest.",
            show_default="0.08, 0.15, 0.05",
        ),
    ],
}


def takes_recipe(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb that ends in `**options` an option for every field of a recipe in their place."""
    signature = inspect.signature(verb, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    fields = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in OPTIONS.items()
    ]
    before = [p for p in own if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    after = [p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY]

    @functools.wraps(verb)
    def with_options(*arguments: Any, **options: Any) -> None:
        verb(*arguments, **options)

    with_options.__signature__ = signature.replace(parameters=[*before, *fields, *after])  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in [*own, *fields]}
    return with_options


def chosen_recipe(path: Path | None, options: dict[str, Any]) -> Any:
    """The recipe in the file `path`, or the defaults, with the options that were given on top."""
    from prunus.pruning.recipe import load_recipe

    return load_recipe(
        path, {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    )
