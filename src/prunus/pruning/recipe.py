"""What to do to a model: validated, frozen, read from and written to TOML. Knows nothing of torch.

A recipe holds everything that decides the bytes of the result. What only decides how the work is done
(memory budget, device) lives beside it and may change between a run and its resumption.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prunus.pruning.presets import preset_options

__all__ = ["MEASURED_ALLOCATIONS", "Recipe", "load_recipe"]

MethodName = Literal["magnitude", "wanda", "wanda-variant", "ria", "sparsegpt", "obs", "alps"]
#: Allocations for which the model is run before its sparsities are known.
MEASURED_ALLOCATIONS = ("owl", "dlp", "search")
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

_PATTERN = re.compile(r"^(\d+):(\d+)$")


class Recipe(BaseModel):
    """One pruning run, in the words of the command line.

    `pattern` is "unstructured" or N:M: keep at most N of every M consecutive inputs of a row. The original
    code of Wanda and SparseGPT counts the zeros instead; for 2:4 and 4:8 both readings agree.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str | None = Field(
        None, description="fast, balanced or best: what is not given otherwise"
    )
    method: MethodName = "wanda"
    sparsity: float = Field(0.5, description="share of each linear's weights that goes, in [0, 1)")
    pattern: str = Field(
        "unstructured", description="'unstructured', or N:M with at most N of M kept"
    )
    group: str | int | None = Field(
        None, description="who competes: row, layer, column, rows per group"
    )
    calibration: str = "c4"
    samples: int = Field(128, description="calibration windows")
    seqlen: int = Field(2048, description="tokens per window")
    seed: int = 0
    batch: int | None = Field(
        None, description="windows per forward pass; chosen from seqlen if not given"
    )
    dtype: DtypeName = Field("auto", description="of the computation; the checkpoint keeps its own")
    propagate: Literal["linear", "block"] = "linear"
    head: bool = Field(False, description="prune the output head too; dense unless asked for")
    only: tuple[str, ...] = Field((), description="name patterns: prune nothing else")
    ignore: tuple[str, ...] = Field((), description="name patterns: leave these dense")
    min_expert_tokens: int | None = Field(
        None,
        description="an expert that fewer tokens choose is measured on all; 0: never; None: by the method",
    )
    mask_from: Literal["wanda", "magnitude"] = "wanda"
    mask_order: Literal["before", "blockwise"] = "before"
    damping: float | None = Field(
        None,
        description="share of the Gram's mean diagonal added before inversion; None: the method's own",
    )
    ria_power: float = Field(0.5, description="exponent of the input norms in ria")
    iterations: int | None = Field(None, description="of alps; None: its own")
    refine: Literal["none", "dsnot", "swaps"] = Field(
        "none", description="look over the mask afterwards"
    )
    refine_steps: int | None = Field(
        None, description="maximum number of steps of refine; None: the refinement's own"
    )
    weight_update: Literal["none", "least-squares"] = Field(
        "none", description="fit the kept weights to the mask at the end"
    )
    dense_weight: float | Literal["auto"] = Field(
        0.0,
        description="share of the dense model in the outputs that the weights approximate; "
        "auto: chosen per linear on held-out windows",
    )
    reconstruct: Literal["none", "last", "all"] = Field(
        "none", description="which blocks are trained towards the dense model after pruning"
    )
    reconstruct_epochs: int | None = Field(
        None, description="epochs of block reconstruction; None: by the number of tokens"
    )
    reconstruct_lr: float | None = Field(
        None, description="peak learning rate of block reconstruction; None: by the weights' size"
    )
    permute: bool = Field(
        False, description="for N:M: reorder inputs first, where that can be folded away"
    )
    allocation: Literal["uniform", "owl", "dlp", "arithmetic", "search"] = Field(
        "uniform", description="how the sparsity is shared out; its mean stays what was asked for"
    )
    allocation_by: Literal["block", "linear"] = Field(
        "block", description="what gets a sparsity of its own"
    )
    allocation_spread: float | None = Field(
        None, description="of owl, dlp, arithmetic: half the range"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset_and_pattern(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = preset_options(values)
        match = _PATTERN.match(str(values.get("pattern", "")))
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            return values
        implied, given = 1 - int(match[1]) / int(match[2]), values.get("sparsity")
        if given is not None and given != implied:
            raise ValueError(
                f"pattern {match[0]} already fixes the sparsity at {implied:g}; got sparsity {given} as well: "
                "give one of the two"
            )
        return {**values, "sparsity": implied}

    @field_validator("sparsity")
    @classmethod
    def _sparsity_in_range(cls, value: float) -> float:
        if not 0 <= value < 1:
            raise ValueError(
                f"sparsity must lie in [0, 1): 0.5 removes half of the weights; got {value}"
            )
        return value

    @field_validator("samples")
    @classmethod
    def _some_samples(cls, value: int) -> int:
        if value < 1:
            raise ValueError(
                f"samples must be at least 1: pruning needs calibration windows; got {value}"
            )
        return value

    @field_validator("seqlen")
    @classmethod
    def _some_tokens(cls, value: int) -> int:
        if value < 2:
            raise ValueError(f"seqlen must be at least 2 tokens; got {value}")
        return value

    @field_validator("min_expert_tokens")
    @classmethod
    def _not_negative(cls, value: int | None) -> int | None:
        if value is not None and value < 0:
            raise ValueError(
                f"min_expert_tokens must be at least 0, which measures no expert on all; got {value}"
            )
        return value

    @field_validator("batch")
    @classmethod
    def _some_windows(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"batch must be at least 1 window; got {value}")
        return value

    @field_validator("damping", "reconstruct_lr")
    @classmethod
    def _positive(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError(f"{info.field_name} must lie in (0, 1); got {value}")
        return value

    @field_validator("ria_power", "allocation_spread")
    @classmethod
    def _in_range(cls, value: float | None, info: ValidationInfo) -> float | None:
        most = {"ria_power": 2, "allocation_spread": 0.5}[str(info.field_name)]
        if value is not None and not 0 <= value <= most:
            raise ValueError(f"{info.field_name} must lie in [0, {most}]; got {value}")
        return value

    @field_validator("dense_weight", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        with contextlib.suppress(TypeError, ValueError):
            value = float(value)
        if value != "auto" and not (isinstance(value, float) and 0 <= value <= 1):
            raise ValueError(
                "dense_weight must lie in [0, 1], 0 using the pruned model only, or be auto; "
                f"got {value}"
            )
        return value

    @field_validator("iterations", "refine_steps", "reconstruct_epochs")
    @classmethod
    def _at_least_once(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"{info.field_name} must be at least 1; got {value}")
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
        n, m = int(match[1]), int(match[2])
        if not 1 <= n <= m:
            raise ValueError(
                f"pattern N:M keeps N of every M weights, so 1 <= N <= M; got {value!r}"
            )
        return value

    @model_validator(mode="after")
    def _options_fit_method(self) -> Recipe:
        if self.method != "obs" and (self.mask_from != "wanda" or self.mask_order != "before"):
            raise ValueError(
                f"mask_from and mask_order belong to method 'obs', not to {self.method!r}; drop them or "
                "choose --method obs"
            )
        if self.method != "ria" and self.ria_power != 0.5:
            raise ValueError(f"ria_power belongs to method 'ria', not to {self.method!r}: drop it")
        if self.method != "alps" and self.iterations is not None:
            raise ValueError(
                f"iterations belong to method 'alps', not to {self.method!r}: drop them"
            )
        if self.dense_weight != 0 and self.propagate == "block":
            raise ValueError(
                "dense_weight needs propagate linear: the original's two passes have no dense "
                "targets"
            )
        if self.permute and not self.n_of_m:
            raise ValueError(
                "permute is for N:M, where channels share groups: give --pattern, or drop it"
            )
        if self.permute and self.propagate == "block":
            raise ValueError(
                "permute needs propagate linear: the original's two passes leave channels in place"
            )
        if self.allocation != "uniform" and self.n_of_m:
            raise ValueError(
                f"allocation {self.allocation} shares out an unstructured sparsity; {self.pattern} is the same everywhere"
            )
        if self.allocation in ("uniform", "search") and self.allocation_spread is not None:
            raise ValueError(
                "allocation_spread belongs to owl, dlp and arithmetic: drop it or choose one of them"
            )
        if self.allocation == "uniform" and self.allocation_by != "block":
            raise ValueError("allocation_by needs an --allocation other than uniform")
        if not self.reconstructs and (
            self.reconstruct_epochs is not None or self.reconstruct_lr is not None
        ):
            raise ValueError(
                "reconstruct_epochs and reconstruct_lr belong to --reconstruct last or all: drop "
                "them or add one"
            )
        if self.reconstructs and self.propagate == "block":
            raise ValueError(
                "reconstruct needs propagate linear: the original's two passes train nothing"
            )
        if self.refine == "none" and self.refine_steps is not None:
            raise ValueError("refine_steps belong to --refine dsnot or swaps: drop them or add one")
        return self

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
        """Whether the linear `name` (its full path in the model) is to be pruned."""
        wanted = not self.only or any(fnmatch.fnmatchcase(name, glob) for glob in self.only)
        return wanted and not any(fnmatch.fnmatchcase(name, glob) for glob in self.ignore)

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse name patterns that match nothing: a silent miss would prune what was to be spared.

        Raises:
            ValueError: a pattern of `only` or `ignore` matches none of `names`, or nothing is left to prune.
        """
        known = list(names)
        for option, globs in (("--only", self.only), ("--ignore", self.ignore)):
            for glob in globs:
                if not any(fnmatch.fnmatchcase(name, glob) for name in known):
                    raise ValueError(
                        f"{option} {glob!r} matches none of the {len(known)} linears; names look like "
                        f"{known[0]!r}, and * stands for anything: '*.mlp.*'"
                    )
        if not any(self.selects(name) for name in known):
            raise ValueError("--only and --ignore leave no linear to prune")

    def to_toml(self) -> str:
        """The recipe as TOML; `load_recipe` reads it back. Options without a value are left out."""
        lines = [
            f"{key} = {_toml_value(value)}"
            for key, value in self.model_dump().items()
            if value is not None
        ]
        return "\n".join(lines) + "\n"


def load_recipe(path: Path | None, overrides: dict[str, Any]) -> Recipe:
    """Read a recipe file (or the defaults) and put `overrides` on top; None values do not override.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML, an unknown key, or a value out of range; the message names the key.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no recipe file {path}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
            raise ValueError(f"recipe {path} is not valid TOML: {fault}") from fault
    values.update({key: value for key, value in overrides.items() if value is not None})
    try:
        return Recipe(**values)
    except ValidationError as fault:
        where = f"recipe {path}: " if path is not None else ""
        raise ValueError(where + "; ".join(_explain(error) for error in fault.errors())) from None


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown option {name!r}; known are {', '.join(Recipe.model_fields)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    return f"{name}: {message.lower()} (got {error['input']!r})"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON and TOML escape alike, but for DEL, which only TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
