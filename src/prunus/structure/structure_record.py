"""The recipe of a run that makes a model smaller, and its record. Imports no torch.

The record is the file `prunus-structure.json` beside the result. It never claims more than the disk
holds: a block enters it after the shard of the block has its final name.

"Old" is a number or a position in the source, "new" one in the result. Both count from 0.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator

from prunus.engine.linear_record import ReconstructionRecord
from prunus.engine.run_options import WindowOptions
from prunus.engine.run_record import BlockwiseRecord, RecordPart
from prunus.options import Option, percent
from prunus.words import counted

#: A share to remove, a float in (0, 1), or a number to keep, an int of at least 1.
Amount = float | int

# A heading of --help.
_CHOICE = "Choice of parts, and repair"


class StructureRecipe(WindowOptions):
    """What is removed from a model, and how it is chosen.

    None for a part means that all of it stays.

    Raises:
        ValueError: An option is out of range.

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
            "Remove this share of the blocks (0.1), or keep this number (27). The block whose "
            "absence changes the next-token distribution least is removed, and the others are "
            "measured again.",
            metavar="AMOUNT",
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
    def _is_amount(cls, raw: Any, info: Any) -> Any:
        """An amount, from a number, from the text of a command line, or from None."""
        value = raw
        if isinstance(raw, str):
            with contextlib.suppress(ValueError):
                value = int(raw) if raw.isdigit() else float(raw)
        is_share = isinstance(value, float) and 0 < value < 1
        # `type`, because True is an `int` for `isinstance`.
        if value is None or is_share or (type(value) is int and value >= 1):
            return value
        raise ValueError(
            f"{info.field_name} is a share to remove in (0, 1), such as 0.25, or a number to keep, "
            f"such as 6; got {raw!r}{percent(raw) if isinstance(raw, str) else ''}"
        )


class ExpertChange(RecordPart):
    """Which experts of one block stay, and what decided it."""

    #: Old numbers of the experts that stay, rising. The new number is the position in this list.
    kept: list[int]
    #: The saliency of every old expert, by the rule of the recipe (`methods/structured.py`).
    saliency: list[float]
    #: How many calibration tokens chose each old expert.
    tokens: list[int]


class SearchStep(RecordPart):
    """One step of the search for blocks, which removes one block."""

    # Earlier versions had two measures, and named theirs in the field `measure`.
    model_config = ConfigDict(extra="ignore")

    #: Old position of the block that is removed.
    block: int
    #: The KL divergence from the dense model, in nats per token, without this block and without
    #: the blocks of the steps before.
    value: float
    #: The divergence for every block of the source; None for a block that this step did not
    #: measure.
    candidates: list[float | None]


class BlockChange(RecordPart):
    """What happened to one block of the result."""

    #: Full name of the block in the result, such as `model.layers.3`.
    name: str
    #: Old position of the block.
    made_from: int
    #: Digest of the weights that the block was made from, in hexadecimal.
    input_sha256: str
    #: None for a block that has no experts or keeps all of them.
    experts: ExpertChange | None = None
    #: The training towards the dense model; None for a block that was not trained.
    repair: ReconstructionRecord | None = None
    #: Time for the block in seconds, without its training.
    seconds: float = 0.0


class StructureRecord(BlockwiseRecord):
    """The record of shrink: what was removed from each block, and how it was chosen."""

    FILE: ClassVar[str] = "prunus-structure.json"
    COMMAND: ClassVar[str] = "prunus shrink"

    #: What the run was asked to remove.
    recipe: StructureRecipe
    #: The steps that removed blocks, in the order in which the search took them.
    search: list[SearchStep] = Field(default_factory=list)
    #: Field of config.json that changed -> its values before and after. Dots separate the levels.
    config: dict[str, tuple[Any, Any]] = Field(default_factory=dict)
    #: Stored tensors that belong to no module of the model. The result does not have them.
    left_out: list[str] = Field(default_factory=list)
    #: The finished blocks of the result, in their order.
    blocks: list[BlockChange] = Field(default_factory=list)


def what_was_removed(record: StructureRecord) -> list[str]:
    """One line per kind of part that was removed, and one for the repair; for people to read.

    >>> step = SearchStep(block=2, value=0.25, candidates=[0.5, None, 0.25])
    >>> what_was_removed(StructureRecord.model_construct(search=[step]))
    ['blocks 2 were removed; divergence at the last step 0.2500']
    """
    lines: list[str] = []
    if record.search:
        last = record.search[-1]
        removed = ", ".join(str(step.block) for step in record.search)
        lines.append(f"blocks {removed} were removed; divergence at the last step {last.value:.4f}")
    changes = [block.experts for block in record.blocks if block.experts is not None]
    if changes:
        lines.append(
            f"{len(changes[0].kept)} of {len(changes[0].saliency)} experts stay in each of "
            f"{counted(len(changes), 'layer')}, chosen by {record.recipe.saliency}"
        )
    repairs = [block.repair for block in record.blocks if block.repair is not None]
    if repairs:
        last_repair = repairs[-1]
        lines.append(
            f"{counted(len(repairs), 'block')} trained towards the outputs of the model; on the "
            f"validation windows the KL divergence is {last_repair.error_after:.4f}, and was "
            f"{last_repair.error_before:.4f} before the last block was trained"
        )
    return lines
