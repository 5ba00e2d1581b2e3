"""What was compressed: the file `prunus-compress.json` next to the result."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from prunus.compression.recipe import CompressionRecipe
from prunus.pruning.manifest import PruningRecord


class CompressionRecord(PruningRecord):
    """The record of compress.

    Attributes:
        packed_outside: Stored name of a packed embedding or head -> its entry in config.json.
    """

    FILE: ClassVar[str] = "prunus-compress.json"
    VERB: ClassVar[str] = "prunus compress"
    DONE: ClassVar[str] = "compressed"

    recipe: CompressionRecipe
    packed_outside: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @property
    def what(self) -> str:
        return f"{self.recipe.bits:g} bits"
