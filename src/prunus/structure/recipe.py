"""The recipe of a run that makes a model smaller, validated and frozen. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from prunus.options import Options
from prunus.options.toml import read_toml
from prunus.pruning.recipe import Recipe
from prunus.runs.options import DtypeName
from prunus.structure.target import parse_target

__all__ = ["Amount", "StructureRecipe", "kept_count", "load_structure_recipe"]

#: A share to remove in (0, 1), or a number to keep.
Amount = float | int


def kept_count(amount: Amount, count: int) -> int:
    """How many of `count` parts stay; a share removes whole parts, rounded to the nearest number.

    >>> kept_count(0.25, 8), kept_count(6, 8), kept_count(0.1, 4)
    (6, 6, 4)
    """
    return amount if isinstance(amount, int) else count - round(count * amount)


class StructureRecipe(Options):
    """What leaves a model, and how that is chosen.

    Raises:
        pydantic.ValidationError: a `ValueError` that lists every option that is out of range.

    >>> StructureRecipe(experts=0.25).saliency
    'reap'
    """

    experts: Amount | None = Field(
        None, description="The share of the experts of each layer to remove, or a number to keep."
    )
    saliency: Literal["reap", "contribution"] = Field(
        "reap", description="By which number experts are chosen."
    )
    blocks: Amount | None = Field(
        None, description="The share of the blocks to remove, or a number to keep."
    )
    block_rule: Literal["kl", "cosine"] = Field(
        "kl", description="By which measurement blocks are chosen."
    )
    width: float | None = Field(
        None,
        description="The share of the channels of each MLP, also of each expert, and of the "
        "attention heads to remove.",
    )
    heads: int | None = Field(
        None, description="The number of query heads to keep. By default it follows from width."
    )
    kv_heads: int | None = Field(
        None, description="The number of key-value heads to keep. By default it follows from width."
    )
    target: str | None = Field(
        None,
        description="What the result must come to, in place of shares: parameters=0.75 of those in "
        "blocks, memory=3GB, or speed=1.3x. Blocks and width are searched for it.",
    )
    repair: bool = Field(
        True,
        description="Whether blocks that changed are trained towards the outputs of the model.",
    )
    calibration: str = Field(
        "c4", description="The source of the calibration windows: a name, a file or a folder."
    )
    samples: int = Field(128, description="The number of calibration windows.")
    seqlen: int = Field(2048, description="The number of tokens per window.")
    seed: int = Field(0, description="The seed of the choice of windows.")
    bos: Literal["auto", "yes", "no"] = Field(
        "auto", description="Whether every window begins with the BOS token."
    )
    batch: int | None = Field(
        None, description="The number of windows per forward pass. By default chosen from seqlen."
    )
    dtype: DtypeName = Field(
        "auto", description="The dtype of the computation. The checkpoint keeps its own dtype."
    )

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
        shares = {
            name: getattr(self, name)
            for name in ("experts", "blocks", "width", "heads", "kv_heads")
            if getattr(self, name) is not None
        }
        if not shares and self.target is None:
            raise ValueError(
                "nothing is to be removed: give experts=0.25, blocks=0.1, width=0.25 or "
                "target='parameters=0.75', for example"
            )
        if self.target is not None:
            parse_target(self.target)
            if shares:
                raise ValueError(
                    f"target and {next(iter(shares))} exclude each other: the search for a target "
                    "chooses blocks and width itself. Drop one of them"
                )
        if self.width is not None and not 0 < self.width < 1:
            raise ValueError(f"width is a share to remove in (0, 1); got {self.width}")
        self.measuring()  # its rules hold for the options that both recipes have
        return self

    @property
    def narrows(self) -> bool:
        """Whether channels or heads go, or may go."""
        return any(x is not None for x in (self.width, self.heads, self.kv_heads, self.target))

    def measuring(self) -> Recipe:
        """The pruning recipe with the same windows, from which a run takes all its checks."""
        shared = {
            name: getattr(self, name)
            for name in ("calibration", "samples", "seqlen", "seed", "bos", "batch", "dtype")
        }
        # The method only says which sums over the inputs are kept: norms or a Gram matrix.
        method = "alps" if self.narrows else "wanda"
        reconstruct: Literal["all", "none"] = "all" if self.repair else "none"
        return Recipe(method=method, sparsity=0.0, reconstruct=reconstruct, **shared)

    def to_toml(self) -> str:
        """The options that are given or not at their defaults, as TOML."""
        # JSON and TOML write these texts and numbers alike.
        given = self.model_dump(exclude_defaults=True)
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
        return "\n".join(lines) + "\n"


def load_structure_recipe(
    base: StructureRecipe | str | Path | None, overrides: Mapping[str, Any]
) -> StructureRecipe:
    """A recipe with `overrides` on top.

    Args:
        base: a recipe, the path of a TOML file, or None for the defaults.
        overrides: options by name; a value of None does not override.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an option is unknown or a value is out of range; names the option.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    if isinstance(base, StructureRecipe):
        values = base.model_dump(exclude_unset=True)
    else:
        values = read_toml(Path(base), "recipe file") if base is not None else {}
    try:
        return StructureRecipe(**(values | given))
    except ValidationError as fault:
        raise ValueError("; ".join(_explain(error) for error in fault.errors()[:4])) from None


def _explain(error: Any) -> str:
    """One of pydantic's errors in the words of the command line."""
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = ", ".join(StructureRecipe.model_fields)
        return f"unknown option {name!r}; known are {known}"
    message = error["msg"].removeprefix("Value error, ")
    return message if error["type"] == "value_error" else f"{name}: {message.lower()}"
