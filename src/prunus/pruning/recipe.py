"""A recipe: everything that decides the bytes of a result, validated and frozen. Free of torch.

A recipe is read from and written to TOML. Options that only decide how the work is done, such as
the memory budget or the device, are not part of it. They may change between a run and its
resumption.

The options of methods are validated in `prunus.methods.options`; this file only adds the rules that
concern a whole run.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prunus.methods.options import (
    RULES,
    MaskFrom,
    MaskOrder,
    MethodName,
    MethodOptions,
    Refine,
    Rule,
    WeightUpdate,
    at_least,
    check_method_options,
    check_value,
    in_range,
)
from prunus.pruning.presets import preset_options

__all__ = ["DtypeName", "Recipe"]

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

_PATTERN = re.compile(r"^(\d+):(\d+)$")
# Recipes have all options of methods but one, which always keeps its published value.
_METHOD_RULES = {name: rule for name, rule in RULES.items() if name != "column_block"}
_RULES = _METHOD_RULES | {
    "sparsity": in_range("[0, 1)", ": 0.5 removes half of the weights"),
    "head_bits": Rule(lambda value: value in (4, 6, 8), "be 4, 6 or 8"),
    "samples": at_least(1, ": pruning needs calibration windows"),
    "seqlen": at_least(2, " tokens"),
    "batch": at_least(1, " window"),
    "min_expert_tokens": at_least(0, ", where 0 always uses an expert's own tokens"),
    "reconstruct_epochs": at_least(1),
    "reconstruct_lr": in_range("(0, 1)"),
}


# What a recipe with bits takes where nothing is said; docs/results/index.md has the figures.
_COMPRESS_DEFAULTS: dict[str, Any] = {"dense_weight": 0.25}


class Recipe(BaseModel):
    """One pruning run, in the words of the command line.

    `pattern` is "unstructured" or N:M, which keeps at most N of every M consecutive inputs of a
    row. (The original code of Wanda and SparseGPT counts the zeros instead; for 2:4 and 4:8 both
    readings agree.) An N:M pattern implies its sparsity.

    Raises:
        pydantic.ValidationError: a `ValueError` that lists every option that is out of range.

    >>> recipe = Recipe(method="sparsegpt", pattern="1:4")
    >>> recipe.sparsity, recipe.n_of_m, recipe.calibration
    (0.75, (1, 4), 'c4')
    >>> Recipe(preset="balanced").method
    'alps'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str | None = Field(
        None,
        description="A named set of options: fast, balanced or best. "
        "Options that are given explicitly override it.",
    )
    method: MethodName = Field(
        "wanda", description="The pruning method, which chooses the mask and may update weights."
    )
    sparsity: float = Field(
        0.5, description="The fraction of each linear's weights to remove, in [0, 1)."
    )
    pattern: str = Field(
        "unstructured",
        description="Either 'unstructured', or N:M to keep at most N of every M inputs.",
    )
    group: str | int | None = Field(
        None,
        description="Which weights compete: row, layer, column, or a number of rows per group. "
        "By default those that compete in the method's paper; row for alps, where it is the layer.",
    )
    calibration: str = Field(
        "c4", description="The source of the calibration windows: a name, a file or a folder."
    )
    samples: int = Field(128, description="The number of calibration windows.")
    seqlen: int = Field(2048, description="The number of tokens per window.")
    seed: int = Field(0, description="The seed of the choice of windows.")
    bos: Literal["auto", "yes", "no"] = Field(
        "auto",
        description="Whether every window begins with the BOS token. auto: if the tokenizer puts "
        "one before a text. yes: always. no: as in the papers.",
    )
    batch: int | None = Field(
        None,
        description="The number of windows per forward pass. By default chosen from seqlen.",
    )
    dtype: DtypeName = Field(
        "auto", description="The dtype of the computation. The checkpoint keeps its own dtype."
    )
    propagate: Literal["linear", "block"] = Field(
        "linear",
        description="Whether inputs reach later linears pruned linear by linear, or in two passes "
        "per block as in the original code.",
    )
    head: bool = Field(
        False, description="Whether to prune the output head too. By default it stays dense."
    )
    only: tuple[str, ...] = Field(
        (), description="Name patterns. Only linears that match one of them are pruned."
    )
    ignore: tuple[str, ...] = Field(
        (), description="Name patterns. Linears that match one of them stay dense."
    )
    min_expert_tokens: int | None = Field(
        None,
        description="An expert with fewer tokens than this is pruned with the statistics of all "
        "tokens. 0 always uses the expert's own. By default it follows from the method.",
    )
    mask_from: MaskFrom = Field("wanda", description="The score of the mask of method obs.")
    mask_order: MaskOrder = Field(
        "before",
        description="Whether method obs chooses its mask before the update or blockwise in it.",
    )
    damping: float | None = Field(
        None,
        description="The fraction of the Gram matrix's mean diagonal that is added before the "
        "matrix is inverted. By default it follows from the method.",
    )
    ria_power: float = Field(
        0.5, description="The exponent of the input norms in the score of method ria."
    )
    iterations: int | None = Field(
        None, description="The number of ADMM iterations of method alps; its own by default."
    )
    bits: float | None = Field(
        None,
        description="The bits per weight of the linears in the result, which is then packed. "
        "Zeros and levels are chosen together; see sparsity for zeros that are forced.",
    )
    head_bits: int | None = Field(
        None,
        description="With bits: the bits per weight of embeddings and output head. By default "
        "they stay as they are.",
    )
    refine: Refine = Field("none", description="How the mask is improved after the method.")
    refine_steps: int | None = Field(
        None, description="The maximum number of rounds of refine. By default its own."
    )
    weight_update: WeightUpdate = Field(
        "none", description="Whether the kept weights are fitted to the mask at the end."
    )
    dense_weight: float | Literal["auto"] = Field(
        0.0,
        description="The share of the dense model in the outputs that the weights approximate. "
        "auto chooses it per linear on held-out windows.",
    )
    reconstruct: Literal["none", "last", "quick", "all"] = Field(
        "none",
        description="Which blocks are trained towards the dense model's outputs after pruning. "
        "quick: all, on about a quarter of the windows.",
    )
    reconstruct_epochs: int | None = Field(
        None,
        description="The epochs of block reconstruction. By default by the number of tokens.",
    )
    reconstruct_lr: float | None = Field(
        None,
        description="The peak learning rate of block reconstruction. By default by weight size.",
    )
    allocation: Literal["uniform", "search"] = Field(
        "uniform", description="How the sparsity is distributed over layers, with the same mean."
    )
    allocation_by: Literal["block", "linear"] = Field(
        "block", description="Whether a block or a linear gets a sparsity of its own."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset_and_sparsity(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values  # a damaged record, which pydantic refuses next
        values = preset_options(values)
        if values.get("bits") is not None:
            # Without a sparsity of their own, zeros follow from the rate.
            values = _COMPRESS_DEFAULTS | values
            if "pattern" not in values:
                values = {"sparsity": 0.0} | values
        match = _PATTERN.match(str(values.get("pattern", "")))
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            return values
        implied, given = 1 - int(match[1]) / int(match[2]), values.get("sparsity")
        if given is not None and given != implied:
            raise ValueError(
                f"pattern {match[0]} already fixes the sparsity at {implied:g}; "
                f"got sparsity {given} as well: give one of the two"
            )
        return {**values, "sparsity": implied}

    @field_validator("dense_weight", mode="before")
    @classmethod
    def _read_dense_weight(cls, value: Any) -> Any:
        # A file or a command line may give the number as text.
        with contextlib.suppress(TypeError, ValueError):
            value = float(value)
        check_value("dense_weight", value)
        return value

    @field_validator(*_RULES)
    @classmethod
    def _in_range(cls, value: Any, info: ValidationInfo) -> Any:
        check_value(str(info.field_name), value, _RULES)
        return value

    @field_validator("group", mode="before")
    @classmethod
    def _known_group(cls, value: str | int | None) -> str | int | None:
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if value is None or value in ("row", "layer", "column"):
            return value
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        raise ValueError(
            f"group must be row, layer, column or a number of rows (1 or more); got {value!r}"
        )

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        if value == "unstructured":
            return value
        match = _PATTERN.match(value)
        if not match:
            raise ValueError(f"pattern must be 'unstructured' or N:M such as 2:4; got {value!r}")
        if not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(
                f"pattern N:M keeps N of every M weights, so 1 <= N <= M; got {value!r}"
            )
        return value

    @model_validator(mode="after")
    def _options_fit_together(self) -> Recipe:
        check_method_options(self.method, self.method_options)
        self._check_two_passes()
        self._check_allocation()
        self._check_bits()
        has_schedule = self.reconstruct_epochs is not None or self.reconstruct_lr is not None
        if has_schedule and not self.reconstructs:
            raise ValueError(
                "reconstruct_epochs and reconstruct_lr belong to --reconstruct last, quick or all: "
                "drop them or add one"
            )
        return self

    def _check_two_passes(self) -> None:
        """Refuse what the two passes per block of the original code do not have."""
        for option, given, reason in (
            ("dense_weight", self.dense_weight != 0, "have no dense targets"),
            ("reconstruct", self.reconstructs, "train nothing"),
        ):
            if self.propagate == "block" and given:
                raise ValueError(
                    f"{option} needs propagate linear: the original's two passes {reason}"
                )

    def _check_bits(self) -> None:
        """Refuse what a compressed checkpoint cannot have."""
        if self.bits is None:
            if self.head_bits is not None:
                raise ValueError("head_bits belongs to bits: give --bits, or drop --head-bits")
            return
        for option, given, reason in (
            ("propagate block", self.propagate == "block", "quantises nothing"),
            ("reconstruct", self.reconstructs, "would train weights away from their integers"),
            ("head", self.head, "prunes the head; --head-bits compresses it"),
        ):
            if given:
                raise ValueError(f"{option} does not go with bits: it {reason}. Drop one of them")

    def _check_allocation(self) -> None:
        if self.searches and self.n_of_m:
            raise ValueError(
                f"allocation {self.allocation} distributes an unstructured sparsity; "
                f"{self.pattern} is the same in every layer: drop one of the two"
            )
        if not self.searches and self.allocation_by != "block":
            raise ValueError("allocation_by belongs to allocation 'search': drop it or choose that")

    @property
    def method_options(self) -> MethodOptions:
        """The options of the method that are part of a recipe."""
        return MethodOptions(**{name: getattr(self, name) for name in _METHOD_RULES})

    @property
    def searches(self) -> bool:
        """Whether the sparsities are searched for before the run."""
        return self.allocation == "search"

    @property
    def reconstructs(self) -> bool:
        """Whether any block is reconstructed."""
        return self.reconstruct != "none"

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(N, M), or None for unstructured sparsity."""
        match = _PATTERN.match(self.pattern)
        return (int(match[1]), int(match[2])) if match else None

    def selects(self, name: str) -> bool:
        """Whether the linear `name` (its full path in the model) is to be pruned.

        >>> Recipe(only=["*.mlp.*"]).selects("model.layers.0.mlp.up_proj")
        True
        """
        wanted = not self.only or any(fnmatch.fnmatchcase(name, glob) for glob in self.only)
        return wanted and not any(fnmatch.fnmatchcase(name, glob) for glob in self.ignore)

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse name patterns that match nothing: a typing error would prune the wrong linears.

        Args:
            names: the full names of all linears of the model.

        Raises:
            ValueError: a pattern of `only` or `ignore` matches no name, or no linear is left.
        """
        known = list(names)
        for option, globs in (("--only", self.only), ("--ignore", self.ignore)):
            for glob in globs:
                if not any(fnmatch.fnmatchcase(name, glob) for name in known):
                    raise ValueError(
                        f"{option} {glob!r} matches none of the {len(known)} linears; names look "
                        f"like {known[0]!r}, and * stands for anything: '*.mlp.*'"
                    )
        if not any(self.selects(name) for name in known):
            raise ValueError("--only and --ignore leave no linear to prune")

    def to_toml(self) -> str:
        """The recipe as TOML, as `load_recipe` reads it. Options without a value are left out."""
        lines = [
            f"{key} = {_toml_value(value)}"
            for key, value in self.model_dump().items()
            if value is not None
        ]
        return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON and TOML escape alike, except for DEL, which only TOML escapes.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
