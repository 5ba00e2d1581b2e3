"""What a run has removed: the file `prunus-structure.json` next to the result."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from prunus.pruning.manifest import ReconstructionRecord
from prunus.runs.record import BlockwiseRecord
from prunus.structure.recipe import StructureRecipe


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ExpertChange(_Entry):
    """What happened to the experts of one block.

    Attributes:
        kept: the old numbers of the experts that stay; the new number is the place in the list.
        saliency: of every old expert.
        tokens: calibration tokens that chose each old expert.
    """

    kept: list[int]
    saliency: list[float]
    tokens: list[int]


class PartChange(_Entry):
    """What happened to the channels or the heads of one block.

    Attributes:
        kept: the old numbers of those that stay; of heads, those of query heads.
        error: ‖X(W − W')ᵀ‖² / ‖XWᵀ‖² at the linear that reads them.
        error_before_fit: the same if the columns that stay had kept their weights.
    """

    kept: list[int]
    error: float
    error_before_fit: float


class WidthChange(_Entry):
    """What happened to the width of one block; None for parts that it lacks, or keeps.

    Attributes:
        channels: of its MLP, if it has one.
        mlps: the same by the linear that reads them, in a block with several MLPs, such as experts.
        heads: of its attention.
    """

    channels: PartChange | None = None
    mlps: dict[str, PartChange] = Field(default_factory=dict)
    heads: PartChange | None = None


class SearchStep(_Entry):
    """One step of the search for blocks.

    Attributes:
        block: position in the source of the block that is removed.
        value: what was measured without it and the blocks of the steps before.
        measure: "divergence" (KL from the dense model, nats per token) or "influence" (1 − the mean
            cosine between hidden states before and after the block).
        candidates: the same for every block of the source; None for those that were not measured.
    """

    block: int
    value: float
    measure: Literal["divergence", "influence"]
    candidates: list[float | None]


class TargetModel(_Entry):
    """A model that meets the target and was measured.

    Attributes:
        blocks: how many blocks stay; those of the first steps of the search are removed.
        width: the share of the width that is removed; None for full width.
        heads: the number of query heads; None for a model of full width.
        value: KL divergence from the dense model, nats per token.
    """

    blocks: int
    width: float | None
    heads: int | None
    value: float


class BlockChange(_Entry):
    """One block of the result.

    Attributes:
        name: full name in the result.
        made_from: position in the source.
        input_sha256: hash of the weights that it was made from.
        experts: None for a block whose experts all stay, or that has none.
        width: None for a run that makes no block narrower.
        repair: the training towards the dense model; None for a block without it.
        seconds: time for the block, without the training.
    """

    name: str
    made_from: int
    input_sha256: str
    experts: ExpertChange | None = None
    width: WidthChange | None = None
    repair: ReconstructionRecord | None = None
    seconds: float = 0.0


class StructureRecord(BlockwiseRecord):
    """The record of shrink.

    Attributes:
        search: the blocks to remove, in the order in which they were found. In the search for a
            target, only the first of them may be removed.
        targets: the models that meet the target and were measured; the best of them is the result.
        config: field of config.json that changed -> its values before and after.
        left_out: stored tensors that the model has no place for; the result does not have them.
    """

    FILE: ClassVar[str] = "prunus-structure.json"
    VERB: ClassVar[str] = "prunus shrink"

    recipe: StructureRecipe
    search: list[SearchStep] = Field(default_factory=list)
    targets: list[TargetModel] = Field(default_factory=list)
    config: dict[str, tuple[Any, Any]] = Field(default_factory=dict)
    left_out: list[str] = Field(default_factory=list)
    blocks: list[BlockChange] = Field(default_factory=list)
