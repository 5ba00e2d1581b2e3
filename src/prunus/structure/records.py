"""The recipe of a run that makes a model smaller, and its record. Imports no torch."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from prunus.hardware.sizes import counted
from prunus.options import Option, between
from prunus.options.declaration import percent
from prunus.pruning.manifest import ReconstructionRecord
from prunus.runs.options import WindowOptions
from prunus.runs.record import BlockwiseRecord, Part

#: A share to remove in (0, 1), or a number to keep.
Amount = float | int

_CHOICE, _WIDTH = "Choice of parts, and repair", "Width"


class StructureRecipe(WindowOptions):
    """What is removed from a model, and how it is chosen.

    >>> StructureRecipe(experts=0.25).saliency
    'reap'
    """

    experts: Annotated[
        Amount | None,
        Option(
            "Remove this share of the experts (0.25), or keep this number (6). Both count in each "
            "layer of a mixture.",
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
            panel=_CHOICE,
        ),
    ] = "reap"
    blocks: Annotated[
        Amount | None,
        Option(
            "Remove this share of the blocks (0.1), or keep this number (27).", metavar="AMOUNT"
        ),
    ] = None
    block_rule: Annotated[
        Literal["kl", "cosine"],
        Option(
            "Choose the blocks to remove by this rule. kl removes the block whose absence changes "
            "the next-token distribution least, and measures again after each removal. cosine "
            "removes the blocks that rotate the hidden states least (ShortGPT).",
            metavar="RULE",
            panel=_CHOICE,
        ),
    ] = "kl"
    width: Annotated[
        float | None,
        Option(
            "Remove this share of heads and channels, such as 0.25. The channels are those of each "
            "MLP and each expert.",
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
    repair: Annotated[
        bool,
        Option(
            "Train the changed blocks, and all blocks after them, to reproduce the outputs of "
            "MODEL on the calibration windows.",
            switch="--repair/--no-repair",
            panel=_CHOICE,
            default="--repair",
        ),
    ] = True

    @field_validator("experts", "blocks", mode="before")
    @classmethod
    def _is_amount(cls, given: Any, info: Any) -> Any:
        value = given
        if isinstance(given, str):
            with contextlib.suppress(ValueError):
                value = int(given) if given.isdigit() else float(given)
        is_share = isinstance(value, float) and 0 < value < 1
        if value is None or is_share or (type(value) is int and value >= 1):
            return value
        raise ValueError(
            f"{info.field_name} is a share to remove in (0, 1), such as 0.25, or a number to keep, "
            f"such as 6; got {given!r}{percent(given) if isinstance(given, str) else ''}"
        )

    @model_validator(mode="after")
    def _asks_for_something(self) -> StructureRecipe:
        names = ("experts", "blocks", "width", "heads", "kv_heads")
        given = [name for name in names if getattr(self, name) is not None]
        if not given:
            raise ValueError(
                "nothing is to be removed: give `experts` 0.25, `blocks` 0.1 or `width` 0.25, for "
                "example"
            )
        return self

    @property
    def narrows(self) -> bool:
        """Whether channels or heads are removed."""
        return any(x is not None for x in (self.width, self.heads, self.kv_heads))


class ExpertChange(Part):
    #: the old numbers of the experts that stay; the new number is the place in the list.
    kept: list[int]
    saliency: list[float]  #: of every old expert
    tokens: list[int]  #: calibration tokens that chose each old expert


class PartChange(Part):
    kept: list[int]  #: the old numbers of those that stay; of heads, those of query heads
    error: float  #: ‖X(W − W')ᵀ‖² / ‖XWᵀ‖² at the linear that reads them
    error_before_fit: float  #: the same if the columns that stay had kept their weights


class SearchStep(Part):
    block: int  #: position in the source of the block that is removed
    value: float  #: what was measured without it and the blocks of the steps before
    #: "divergence" (KL from the dense model, nats per token) or "influence" (1 − the mean cosine
    #: between hidden states before and after the block).
    measure: Literal["divergence", "influence"]
    #: the same for every block of the source; None for those that were not measured.
    candidates: list[float | None]


class BlockChange(Part):
    name: str  #: full name in the result
    made_from: int  #: position in the source
    input_sha256: str  #: hash of the weights that it was made from
    #: None for a block whose experts all stay, or that has none.
    experts: ExpertChange | None = None
    #: of what became narrower: `heads`, and `channels` of the MLP, or of several MLPs, such as
    #: experts, each by the linear that reads it.
    width: dict[str, PartChange] = Field(default_factory=dict)
    #: the training towards the dense model; None for a block without it.
    repair: ReconstructionRecord | None = None
    seconds: float = 0.0  #: time for the block, without the training


class StructureRecord(BlockwiseRecord):
    """The record of shrink."""

    FILE: ClassVar[str] = "prunus-structure.json"
    VERB: ClassVar[str] = "prunus shrink"

    recipe: StructureRecipe
    #: the blocks that are removed, in the order in which they were found.
    search: list[SearchStep] = Field(default_factory=list)
    #: field of config.json that changed -> its values before and after.
    config: dict[str, tuple[Any, Any]] = Field(default_factory=dict)
    #: stored tensors that the model has no place for; the result does not have them.
    left_out: list[str] = Field(default_factory=list)
    blocks: list[BlockChange] = Field(default_factory=list)


def what_was_removed(record: StructureRecord) -> list[str]:
    """One line per kind of part that was removed."""
    lines = []
    if record.search:
        which, last = ", ".join(str(step.block) for step in record.search), record.search[-1]
        lines.append(
            f"blocks {which} were removed; {last.measure} at the last step {last.value:.4f}"
        )
    narrower: dict[str, list[PartChange]] = {"channels": [], "heads": [], "": []}
    for block in record.blocks:
        for name, part in block.width.items():
            narrower[name if name in narrower else ""].append(part)
    for name, parts in narrower.items():
        if parts:
            what = (
                f"{len(parts[0].kept)} of the {name} stay in each of {counted(len(parts), 'block')}"
            )
            if not name:
                what = f"{len(parts)} experts and other MLPs of blocks with several are narrower"
            mean = sum(part.error for part in parts) / len(parts)
            lines.append(f"{what}; mean relative error where they are read {mean:.3%}")
    changes = [block.experts for block in record.blocks if block.experts is not None]
    if changes:
        lines.append(
            f"{len(changes[0].kept)} of {len(changes[0].saliency)} experts stay in each of "
            f"{counted(len(changes), 'layer')}, chosen by {record.recipe.saliency}"
        )
    repairs = [block.repair for block in record.blocks if block.repair is not None]
    if repairs:
        end = repairs[-1]
        lines.append(
            f"{counted(len(repairs), 'block')} trained towards the outputs of the model; on the "
            f"validation windows the KL divergence is {end.error_after:.4f}, and was "
            f"{end.error_before:.4f} before the last block was trained"
        )
    return lines
