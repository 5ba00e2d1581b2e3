"""A recipe: everything that decides the bytes of a pruned model, validated and frozen.

Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from prunus.engine.linear_options import SELECTION, ExtraSteps, PresetOptions
from prunus.methods.method_options import METHOD
from prunus.options import Option, at_least
from prunus.pruning.options import PruningOptions

# Heading of these options in --help.
_RECONSTRUCTION = "Reconstruction"


class Recipe(PresetOptions, PruningOptions):
    """One run of prune, in the words of the command line.

    Attributes:
        ELSEWHERE: Name of an option that belongs to another command -> what the error says of it.
        propagate: "linear" runs the windows through a block once, where each linear sees the effect
            of all pruning before it. "block" runs them twice per block, as the original code does.
        head: Whether the output head is pruned too.
        reconstruct: The blocks whose surviving weights are trained towards the dense model.
        reconstruct_epochs: Epochs of that training; None chooses them by the number of tokens.

    Raises:
        pydantic.ValidationError: A `ValueError` that lists every option that is out of range.

    >>> recipe = Recipe(method="sparsegpt", pattern="1:4")
    >>> recipe.sparsity, recipe.n_of_m, recipe.calibration
    (0.75, (1, 4), 'mix')
    >>> Recipe(preset="balanced").method
    'alps'
    """

    ELSEWHERE: ClassVar[dict[str, str]] = dict.fromkeys(
        ("bits", "size", "head_bits"), "it belongs to a compressed checkpoint; use prunus compress"
    ) | {"data_dir": "it is the field of a record; the option is `data`"}

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"method": "wanda"},
        "balanced": {"method": "alps", "dense_weight": 0.25, "reconstruct": "last"},
        "best": {"method": "alps", "dense_weight": 0.25, "reconstruct": "all"},
    }

    propagate: Annotated[
        Literal["linear", "block"],
        Option(
            "Run the windows through a block once, where each linear sees the effect of all "
            "pruning before it (linear), or twice, as the original code does (block). Weight "
            "updates then use its order of operations, on one thread.",
            metavar="STEP",
            panel=METHOD,
            is_condition=True,
        ),
    ] = "linear"
    head: Annotated[
        bool,
        Option(
            "Prune the output head too. A head that is tied to the embeddings is refused.",
            panel=SELECTION,
            is_condition=True,
        ),
    ] = False
    reconstruct: Annotated[
        Literal["none", "last", "all"],
        Option(
            "Train the surviving weights of these blocks towards the dense model: last (only the "
            "last block, towards the dense logits) or all.",
            metavar="BLOCKS",
            panel=_RECONSTRUCTION,
        ),
    ] = "none"
    reconstruct_epochs: Annotated[
        int | None,
        Option(
            "Train each block for this number of epochs.",
            metavar="N",
            panel=_RECONSTRUCTION,
            within=at_least(1),
            default="by the number of tokens, at most 5",
        ),
    ] = None

    @classmethod
    def filled_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        """See `PresetOptions`. `balanced` and `best` distribute an unstructured sparsity.

        >>> Recipe(preset="best").allocation, Recipe(preset="best", pattern="2:4").allocation
        ('fisher', 'uniform')
        """
        values = super().filled_in(values)
        free = values.get("pattern", "unstructured") == "unstructured" and not values.get(
            "sparsity_of"
        )
        if free and values.get("preset") in ("balanced", "best"):
            values = {"allocation": "fisher"} | values
        return values

    def check_fit(self) -> None:
        """Check that the options fit together, and the training of blocks fits the others.

        Raises:
            ValueError: The two passes of `propagate` block shall train or use dense targets, or
                epochs are given for no training.
        """
        super().check_fit()
        for option, is_set, reason in (
            ("dense_weight", self.dense_weight != 0, "have no dense targets"),
            ("reconstruct", self.reconstruct != "none", "train nothing"),
        ):
            if self.propagate == "block" and is_set:
                raise ValueError(
                    f"{option} needs propagate linear: the original's two passes {reason}"
                )
        if self.reconstruct_epochs is not None and self.reconstruct == "none":
            raise ValueError(
                "reconstruct_epochs belongs to `reconstruct` last or all: drop it or add one"
            )

    @property
    def extras(self) -> ExtraSteps:
        """The options `reconstruct`, `reconstruct_epochs`, `propagate` and `head`."""
        two_passes = self.propagate == "block"
        return ExtraSteps(
            reconstruct=self.reconstruct,
            epochs=self.reconstruct_epochs,
            two_passes=two_passes,
            head=self.head,
        )
