"""The options that decide the bytes of a compressed checkpoint. Imports no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar

from prunus.methods.options import DenseWeight
from prunus.options import Option, between, one_of
from prunus.pruning.options import PruningOptions, Sparsity


class CompressionRecipe(PruningOptions):
    """One run of compress, in the words of the command line.

    Without a sparsity or a pattern, zeros follow from the rate.

    Raises:
        pydantic.ValidationError: A `ValueError` that lists every option that is out of range.

    >>> recipe = CompressionRecipe(bits=3)
    >>> recipe.sparsity, recipe.dense_weight
    (0.0, 0.25)
    """

    ELSEWHERE: ClassVar[dict[str, str]] = {
        "preset": "presets are for prune",
        "propagate": "compress always runs one pass",
        "reconstruct": "it would train weights away from their integers",
        "head": "it prunes the head, and head_bits compresses it",
    }

    # The figures behind these defaults are in docs/results/index.md.
    sparsity: Sparsity = 0.0
    dense_weight: DenseWeight = 0.25
    bits: Annotated[
        float,
        Option(
            "Let the linears take this number of bits per weight in the file, with scales and all "
            "that belongs to them, from 1 to 7.",
            metavar="N",
            within=between("[1, 7]", ": 3 makes the linears a fifth of their bfloat16 size"),
        ),
    ]
    head_bits: Annotated[
        int | None,
        Option(
            "Store embeddings and output head with this number of bits per weight: 4, 6 or 8.",
            metavar="N",
            within=one_of((4, 6, 8)),
            default="they stay as they are",
        ),
    ] = None
