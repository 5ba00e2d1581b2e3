"""The recipe of a run that makes a model smaller, validated and frozen. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from prunus.options import Option, between
from prunus.runs.options import WindowOptions
from prunus.structure.target import parse_target

#: A share to remove in (0, 1), or a number to keep.
Amount = float | int

_WIDTH = "Width"


def kept_count(amount: Amount, count: int) -> int:
    """How many of `count` parts stay; a share removes whole parts, rounded to the nearest number.

    >>> kept_count(0.25, 8), kept_count(6, 8), kept_count(0.1, 4)
    (6, 6, 4)
    """
    return amount if isinstance(amount, int) else count - round(count * amount)


class StructureRecipe(WindowOptions):
    """What is removed from a model, and how it is chosen.

    Raises:
        pydantic.ValidationError: A `ValueError` that lists every option that is out of range.

    >>> StructureRecipe(experts=0.25).saliency
    'reap'
    """

    experts: Annotated[
        Amount | None,
        Option(
            "Remove this share of the experts in each layer of a mixture, such as 0.25, or keep "
            "this number, such as 6.",
            metavar="AMOUNT",
        ),
    ] = None
    saliency: Annotated[
        Literal["reap", "contribution"],
        Option(
            "Choose the experts to remove by the norm of their outputs times the router's weight. "
            "reap removes those with the smallest mean over the tokens that choose them; "
            "contribution, those with the smallest sum.",
            metavar="RULE",
        ),
    ] = "reap"
    blocks: Annotated[
        Amount | None,
        Option(
            "Remove this share of the blocks, such as 0.1, or keep this number.", metavar="AMOUNT"
        ),
    ] = None
    block_rule: Annotated[
        Literal["kl", "cosine"],
        Option(
            "Choose the blocks to remove by this rule. kl removes the block whose absence changes "
            "the next-token distribution least, and measures again after each removal. cosine "
            "removes the blocks that rotate the hidden states least (ShortGPT).",
            metavar="RULE",
        ),
    ] = "kl"
    width: Annotated[
        float | None,
        Option(
            "Remove this share of the attention heads, and of the channels of each MLP and each "
            "expert, such as 0.25.",
            metavar="SHARE",
            within=between("(0, 1)", ", a share to remove"),
        ),
    ] = None
    heads: Annotated[
        int | None,
        Option(
            "Keep this number of query heads. With all of them, only the MLPs become narrower.",
            metavar="N",
            panel=_WIDTH,
            default="by the share of the width, as nearly as key-value groups allow",
        ),
    ] = None
    kv_heads: Annotated[
        int | None,
        Option(
            "Keep this number of key-value heads.",
            metavar="N",
            panel=_WIDTH,
            default="by the share of the width",
        ),
    ] = None
    target: Annotated[
        str | None,
        Option(
            "Search for blocks and width to remove until this is reached: parameters=0.75 of those "
            "in blocks, memory=3GB for all tensors, or speed=1.3x (bytes read per token at batch "
            "1). Of several models that reach it, the one with the smallest KL divergence is made.",
            metavar="TARGET",
        ),
    ] = None
    repair: Annotated[
        bool,
        Option(
            "Train the changed blocks, and all blocks after them, to reproduce the outputs of "
            "MODEL on the calibration windows.",
            switch="--repair/--no-repair",
            default="--repair",
        ),
    ] = True

    @field_validator("experts", "blocks", mode="before")
    @classmethod
    def _is_amount(cls, value: Any, info: Any) -> Any:
        if value is None:
            return None
        given = value
        if isinstance(value, str):
            try:
                value = float(value) if "." in value or "e" in value.lower() else int(value)
            except ValueError:
                value = None
        valid = (isinstance(value, float) and 0 < value < 1) or (
            isinstance(value, int) and not isinstance(value, bool) and value >= 1
        )
        if not valid:
            raise ValueError(
                f"{info.field_name} is a share to remove in (0, 1), such as 0.25, or a number to "
                f"keep, such as 6; got {given!r}"
            )
        return value

    @model_validator(mode="after")
    def _asks_for_something(self) -> StructureRecipe:
        names = ("experts", "blocks", "width", "heads", "kv_heads")
        given = [name for name in names if getattr(self, name) is not None]
        if not given and self.target is None:
            raise ValueError(
                "nothing is to be removed: give `experts` 0.25, `blocks` 0.1, `width` 0.25 or "
                "`target` parameters=0.75, for example"
            )
        if self.target is not None:
            parse_target(self.target)
            if given:
                raise ValueError(
                    f"`target` and `{given[0]}` exclude each other: the search for a target "
                    "chooses blocks and width itself. Drop one of them"
                )
        return self

    @property
    def narrows(self) -> bool:
        """Whether channels or heads are removed, or may be."""
        return any(x is not None for x in (self.width, self.heads, self.kv_heads, self.target))
