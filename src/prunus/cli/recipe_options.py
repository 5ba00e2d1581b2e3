"""The options of a recipe on the command line, declared once for `prune`, `compress` and `plan`.

`OPTIONS` holds the fields that have a flag. The fields in `RECIPE_ONLY` serve research. They have
no flag and stand in recipe files.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prunus.cli import arguments as arg

__all__ = ["COMPRESSION", "OPTIONS", "RECIPE_ONLY", "RecipeFile", "chosen_recipe", "takes_recipe"]

_CALIBRATION = "Calibration"
_METHOD = "Method"
_RECONSTRUCTION = "Reconstruction"
_ALLOCATION = "Allocation"

#: Fields that make a recipe one of `compress`; `prune` does not have them.
COMPRESSION = ("bits", "head_bits")
#: Fields of a recipe without a flag.
RECIPE_ONLY = (
    "min_expert_tokens",
    "mask_from",
    "mask_order",
    "ria_power",
    "refine_steps",
    "allocation_by",
)


def _parse_share(text: str) -> float:
    """A sparsity from the command line. An N:M pattern gets a hint to the option it belongs to."""
    try:
        return float(text)
    except ValueError:
        hint = f"; did you mean --pattern {text}?" if ":" in text else ""
        with contextlib.suppress(ValueError):
            hint = f"; did you mean {float(text.removesuffix('%')) / 100:g}?"
        raise typer.BadParameter(f"{text!r} is not a share such as 0.5{hint}") from None


#: Field of a recipe -> type and help of its option. An option that is not given stays None.
OPTIONS: dict[str, Any] = {
    "preset": Annotated[
        Literal["fast", "balanced", "best", "max"] | None,
        typer.Option(
            metavar="PRESET",
            help="Tested set of options: fast, balanced or best. Explicit options override it. "
            "max (prune and plan): best, then a training of all kept weights.",
        ),
    ],
    "method": Annotated[
        Literal["magnitude", "wanda", "wanda-variant", "ria", "sparsegpt", "obs", "alps"] | None,
        typer.Option(
            metavar="METHOD",
            help="magnitude, wanda, wanda-variant, ria, sparsegpt, obs or alps. Default: wanda.",
        ),
    ],
    "sparsity": Annotated[
        float | None,
        typer.Option(
            parser=_parse_share,
            metavar="SHARE",
            help="Share of each linear's weights to remove, in [0, 1). Default: 0.5; of compress: "
            "0, and zeros follow from the rate.",
        ),
    ],
    "bits": Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Bits per weight of the linears in the compressed file, scales and all else "
            "counted, from 1 to 7.",
        ),
    ],
    "head_bits": Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Bits per weight of embeddings and output head: 4, 6 or 8. Default: they stay "
            "as they are.",
        ),
    ],
    "pattern": Annotated[
        str | None,
        typer.Option(
            metavar="N:M",
            help="Keep at most N of every M consecutive inputs, such as 2:4. "
            "Default: unstructured.",
        ),
    ],
    "calibration": Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="c4, wikitext2, ptb, python-docs, self (text that the model writes) or a file: "
            ".txt, .jsonl, .jsonl.gz, .parquet, .safetensors with input_ids. For image "
            "classifiers: a folder of images. Default: c4.",
        ),
    ],
    "samples": Annotated[
        int | None, typer.Option(metavar="N", help="Number of calibration windows. Default: 128.")
    ],
    "seqlen": Annotated[
        int | None, typer.Option(metavar="N", help="Tokens per window. Default: 2048.")
    ],
    "seed": Annotated[
        int | None,
        typer.Option(metavar="N", help="Seed of the random choice of windows. Default: 0."),
    ],
    "bos": Annotated[
        arg.BosName | None,
        typer.Option(
            metavar="BOS",
            rich_help_panel=_CALIBRATION,
            help=arg.BOS_HELP,
        ),
    ],
    "batch": Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_CALIBRATION,
            help="Windows per forward pass. Default: as many as hold about 4096 tokens.",
        ),
    ],
    "propagate": Annotated[
        Literal["linear", "block"] | None,
        typer.Option(
            metavar="STEP",
            rich_help_panel=_CALIBRATION,
            help="linear: one pass, in which each linear sees the effect of all pruning before "
            "it. block: two passes per block, as the original code; weight updates then use its "
            "order of operations, on one thread. Default: linear.",
        ),
    ],
    "group": Annotated[
        str | None,
        typer.Option(
            metavar="GROUP",
            rich_help_panel=_METHOD,
            help="The weights among which the lowest scores are removed: row, layer, column, or "
            "a number of rows. Default: as published for the method; row for alps, whose own code "
            "compares the whole layer.",
        ),
    ],
    "damping": Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            rich_help_panel=_METHOD,
            help="Ridge on the Gram matrix before it is inverted, as a share of its mean "
            "diagonal. Default: 0.01; alps, swaps and least squares choose it by the number of "
            "tokens.",
        ),
    ],
    "iterations": Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_METHOD,
            help="Iterations of --method alps. Default: 12 ADMM iterations.",
        ),
    ],
    "refine": Annotated[
        Literal["none", "swaps"] | None,
        typer.Option(
            metavar="REFINEMENT",
            rich_help_panel=_METHOD,
            help="Exchange weights of a finished mask as long as the output error falls (swaps). "
            "Default: none.",
        ),
    ],
    "weight_update": Annotated[
        Literal["none", "least-squares"] | None,
        typer.Option(
            metavar="UPDATE",
            rich_help_panel=_METHOD,
            help="least-squares: fit the kept weights to the mask of any method. Default: none.",
        ),
    ],
    "dense_weight": Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            rich_help_panel=_METHOD,
            help="Share of the dense model in the outputs that updated weights approximate: 0 to "
            "1, or auto (chosen per linear on held-out windows). Above 0 the dense model runs as "
            "well. Default: 0.",
        ),
    ],
    "reconstruct": Annotated[
        Literal["none", "last", "quick", "all"] | None,
        typer.Option(
            metavar="BLOCKS",
            rich_help_panel=_RECONSTRUCTION,
            help="Blocks whose surviving weights are trained towards the dense model: none, last "
            "(only the last block, towards the dense logits), quick (all blocks, on about a "
            "quarter of the windows) or all. Default: none.",
        ),
    ],
    "reconstruct_epochs": Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_RECONSTRUCTION,
            help="Epochs per block. Default: by the number of tokens, at most 7 epochs.",
        ),
    ],
    "reconstruct_lr": Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            rich_help_panel=_RECONSTRUCTION,
            help="Peak learning rate. Default: 0.7 % of the RMS of a tensor's weights; 0.2 % in "
            "the last block.",
        ),
    ],
    "allocation": Annotated[
        Literal["uniform", "search"] | None,
        typer.Option(
            metavar="RULE",
            rich_help_panel=_ALLOCATION,
            help="Distribute the sparsity over the blocks. uniform: the same for all. search: "
            "blocks whose pruning changes the outputs most keep more. Default: uniform.",
        ),
    ],
    "only": Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            rich_help_panel=_ALLOCATION,
            help="Prune only linears whose names match; may be repeated.",
        ),
    ],
    "ignore": Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            rich_help_panel=_ALLOCATION,
            help="Leave linears whose names match dense; may be repeated.",
        ),
    ],
    "head": Annotated[
        bool | None,
        typer.Option(
            "--head",
            rich_help_panel=_ALLOCATION,
            help="Prune the output head too. A head that is tied to the embeddings is refused.",
        ),
    ],
    "dtype": Annotated[
        arg.DtypeName | None,
        typer.Option(
            metavar="DTYPE",
            rich_help_panel=arg.ADVANCED,
            help="Dtype of the computation: auto, float32, bfloat16 or float16. The checkpoint "
            "keeps its own. Default: auto.",
        ),
    ],
}

RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE.toml",
        rich_help_panel=arg.ADVANCED,
        help="File with options; flags override it. These options have no flag and stand only "
        f"there: {', '.join(RECIPE_ONLY)}.",
    ),
]


def takes_recipe(
    without: Sequence[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb that ends in `**options` one option per entry of `OPTIONS` in their place.

    Typer reads a function's signature. We therefore replace the signature and leave the function.

    Args:
        without: entries of `OPTIONS` that the verb does not take.
    """
    return lambda verb: _with_options(verb, without)


def _with_options(verb: Callable[..., None], without: Sequence[str]) -> Callable[..., None]:
    signature = inspect.signature(verb, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    fields = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in OPTIONS.items()
        if name not in without
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
    """Read the recipe in the file `path`, or take the defaults, and put the given options on top.

    Args:
        path: value of `--recipe`.
        options: field of a recipe -> value; None where the user gave no such option.

    Returns:
        A `prunus.Recipe`.
    """
    from prunus.pruning.recipe_file import load_recipe

    return load_recipe(
        path, {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    )
