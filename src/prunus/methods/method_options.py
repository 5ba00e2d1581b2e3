"""The options of pruning methods, each declared once. Imports no torch.

A recipe has these fields too. `table.py` says which options each method takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from prunus.options import Option, Options, at_least, between

#: The panel of these options in the help.
METHOD = "Method"


#: The option `dense_weight`, whose default differs between commands.
DenseWeight = Annotated[
    float,
    Option(
        "Let updated weights approximate outputs with this share of the dense model. Above 0 the "
        "dense model runs as well.",
        metavar="SHARE",
        panel=METHOD,
        within=between("[0, 1]", ", where 0 uses the pruned model only"),
    ),
]


class UpdateOptions(Options):
    """What all updates of weights read, those of rounding too.

    Attributes:
        damping: λ, as a share of the mean diagonal of the Gram matrix, in (0, 1).
        dense_weight: α, the share of the dense model in the outputs to approximate, in [0, 1]; see
            `dense_targets.py`.

    Raises:
        ValueError: A value is out of range.
    """

    damping: Annotated[
        float | None,
        Option(
            "Add a ridge to the Gram matrix before it is inverted, as a share of its mean "
            "diagonal.",
            metavar="SHARE",
            panel=METHOD,
            within=between("(0, 1)", ": it is a fraction of the Gram matrix's mean diagonal"),
            default="0.01; alps and least squares choose it by the number of tokens",
        ),
    ] = None
    dense_weight: DenseWeight = 0.0


class MethodOptions(UpdateOptions):
    """What methods, their targets and the update of their weights read.

    A field whose value is None has a default that depends on the linear or on the method; its
    declaration says which.

    Attributes:
        iterations: The iterations of method alps, at least 1.
        weight_update: How the kept weights are fitted after the method; see
            `solvers/least_squares.py`.
        keep_zeros: Whether weights that are zero already stay zero, also in updates of weights.
        ria_power: The power of the input norms in RIA's score, in [0, 2].
        masks: A file of masks or a pruned folder, whose zeros methods mask and obs take; None for
            a mask of the method's own.
        mask_from: The score of the mask of method obs.
        block_size: The columns of a block: of the groups "block" and "block-row", and of the mask
            and the update of SparseGPT.
        mask_order: Whether method obs chooses its mask before the update or in the course of it.

    Raises:
        ValueError: A value is out of range.
    """

    iterations: Annotated[
        int | None,
        Option(
            "Run this number of iterations of method alps.",
            metavar="N",
            panel=METHOD,
            within=at_least(1),
            default="12",
        ),
    ] = None
    weight_update: Annotated[
        Literal["none", "least-squares"],
        Option(
            "Fit the kept weights to the mask of any method (least-squares).",
            metavar="UPDATE",
            panel=METHOD,
        ),
    ] = "none"
    keep_zeros: Annotated[
        bool,
        Option(
            "Keep weights zero that are zero already, also in updates. The zeros to make include "
            "them.",
            panel=METHOD,
        ),
    ] = False
    ria_power: Annotated[
        float,
        Option(
            "Raise the input norms in the score of method ria to this power.",
            metavar="POWER",
            panel=METHOD,
            within=between("[0, 2]"),
        ),
    ] = 0.5
    masks: Annotated[
        Path | None,
        Option(
            "Remove exactly the weights that are zero in this pruned folder or file of masks "
            "(method mask, or obs).",
            metavar="PATH",
            panel=METHOD,
        ),
    ] = None
    mask_from: Annotated[
        Literal["wanda", "magnitude"],
        Option("Choose the mask of method obs by this score.", metavar="SCORE", panel=METHOD),
    ] = "wanda"
    mask_order: Annotated[
        Literal["before", "blockwise"],
        Option(
            "Choose the mask of method obs before the update, or blockwise in it.",
            metavar="ORDER",
            panel=METHOD,
        ),
    ] = "before"
    block_size: Annotated[
        int,
        Option(
            "Take this number of columns as a block of sparsegpt and obs, and of the groups block "
            "and block-row.",
            metavar="N",
            panel=METHOD,
            within=at_least(1),
        ),
    ] = 128

    @property
    def adds_steps(self) -> bool:
        """Whether steps are added to a method; see `composition.compose`."""
        return self.weight_update != "none" or self.dense_weight != 0 or self.keep_zeros
