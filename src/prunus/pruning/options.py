"""Which weights prune removes, and how the others follow: the options of a recipe of prune.

`prunus.pruning.recipe` adds presets and the training of blocks. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_serializer

from prunus.engine.linear_options import SELECTION, LinearOptions
from prunus.methods.allocation import ALLOCATION_NAMES
from prunus.methods.method_options import METHOD, MethodOptions
from prunus.methods.table import METHOD_NAMES, METHODS, check_owners
from prunus.options import Option, between, percent
from prunus.words import naming

# How a sparsity by hand is written.
_SHARE_FORM = "GLOB=SHARE, such as '*.mlp.*=0.6'"
# N:M, such as 2:4.
_PATTERN = re.compile(r"^([0-9]+):([0-9]+)\Z")
# The options that decide what given masks decide.
_CHOICES = ("sparsity_of", "pattern", "group", "allocation", "mask_from", "mask_order", "head")


class PruningOptions(MethodOptions, LinearOptions):
    """Which weights are removed, and how others follow.

    `pattern` is "unstructured" or N:M, which keeps at most N of every M consecutive inputs of a
    row. (The original code of Wanda and SparseGPT counts the zeros instead; for 2:4 and 4:8 both
    readings agree.) An N:M pattern implies its sparsity.

    Attributes:
        method: The pruning method, by name or as FILE.py:NAME. It chooses the zeros, and may update
            the other weights.
        sparsity: The share of each linear's weights to remove, in [0, 1). A mapping or a list is
            taken for `sparsity_of`.
        sparsity_of: Sparsities by hand: pairs of a glob and a sparsity, of which the first that
            matches the full name of a linear counts, or a sparsity for each block. All linears
            that no glob matches have `sparsity`. A mapping and texts such as "*.mlp.*=0.6" are
            taken for pairs.
        pattern: "unstructured", or N:M.
        group: Which weights compete: "row", "layer", "column", "block" (all rows of `block_size`
            columns), "block-row" (each row of them), or a number of rows per group; None for those
            that compete in the method's paper.
        allocation: How the sparsity is distributed over linears: a rule by name, with the same
            mean, or a function of one's own as FILE.py:NAME.
        method_options: The options that a method of one's own declares: name -> value. A keyword or
            a line of a file that is no option of prunus is taken for one of them.

    Raises:
        pydantic.ValidationError: A `ValueError` that lists every option that is out of range.

    >>> PruningOptions(pattern="2:4").sparsity
    0.5
    """

    method: Annotated[
        str,
        Option(
            f"Remove weights by {', '.join(METHODS)}, or FILE.py:NAME.",
            metavar="METHOD",
            suggestions=lambda: METHODS,
        ),
    ] = "wanda"
    sparsity: Annotated[
        float,
        Option(
            "Remove this share of weights.",
            metavar="SHARE",
            within=between("[0, 1)", ": 0.5 removes half of the weights"),
            is_condition=True,
        ),
    ] = 0.5
    sparsity_of: Annotated[
        tuple[tuple[str, float] | float, ...],
        Option(
            "Remove this share from linears whose names match; may be repeated, and the first "
            "match counts. The other linears have --sparsity.",
            metavar="GLOB=SHARE",
            panel=SELECTION,
            is_condition=True,
        ),
    ] = ()
    pattern: Annotated[
        str,
        Option(
            "Keep at most N of every M consecutive inputs, such as 2:4.",
            metavar="N:M",
            is_condition=True,
        ),
    ] = "unstructured"
    group: Annotated[
        str | int | None,
        Option(
            "Remove the lowest scores among these weights: row (one output), layer (the whole "
            "matrix), column (one input), block (all rows of 128 columns), block-row (one row of "
            "them), or a number of rows per group.",
            metavar="GROUP",
            panel=METHOD,
            default="as published for the method; row for alps, whose own code compares the layer",
        ),
    ] = None
    allocation: Annotated[
        str,
        Option(
            "Give all linears the same sparsity (uniform), or let those whose errors cost the "
            "model most keep more, by gradients of the dense model (fisher), or blocks with more "
            "outliers (owl), or ask a function of your own, FILE.py:NAME.",
            metavar="RULE",
            panel=SELECTION,
            suggestions=lambda: ALLOCATION_NAMES.known,
        ),
    ] = "uniform"

    method_options: Annotated[
        dict[str, bool | int | float | str],
        Option(
            "Set an option of your own method; may be repeated.",
            metavar="NAME=VALUE",
            panel=METHOD,
            switch="--set",
        ),
    ] = Field(default={})

    @field_validator("method_options", mode="before")
    @classmethod
    def _read_assignments(cls, value: Any) -> Any:
        """A dict, or a list of texts such as "power=0.5" from the command line."""
        if not isinstance(value, list | tuple):
            return value
        options = dict(_assignment(text, "NAME=VALUE, such as power=0.5") for text in value)
        for name, text in options.items():
            with contextlib.suppress(ValueError):
                options[name] = json.loads(text)
        return options

    @field_validator("sparsity_of", mode="before")
    @classmethod
    def _read_shares(cls, value: Any) -> Any:
        """A mapping, or a list of pairs, of texts such as "*.mlp.*=0.6", or of numbers."""
        if isinstance(value, Mapping):
            value = value.items()
        elif isinstance(value, str) or not isinstance(value, Iterable):
            raise ValueError(f"give sparsities by GLOB, or a list of one per block; got {value!r}")
        shares: list[tuple[str, float] | float] = []
        for share in value:
            pair = _assignment(share, _SHARE_FORM) if isinstance(share, str) else share
            glob, number = pair if isinstance(pair, list | tuple) else (None, pair)
            with naming(f"sparsity_of {glob or f'block {len(shares)}'}"):
                try:
                    number = float(str(number))
                except ValueError:
                    raise ValueError(
                        f"the share must be a number such as 0.6; got {number!r}{percent(number)}"
                    ) from None
                between("[0, 1)").check("the share", number)
            shares.append(number if glob is None else (str(glob), number))
        if len({type(share) for share in shares}) > 1:
            raise ValueError(f"give sparsity_of either {_SHARE_FORM}, or one number per block")
        return tuple(shares)

    @model_serializer(mode="wrap")
    def _without_unasked_sparsity(self, dump: Any) -> dict[str, Any]:
        """All values; next to sparsities by hand no default that nobody has asked for."""
        values: dict[str, Any] = dump(self)
        if self.sparsity_of and self.asked_sparsity is None:
            values.pop("sparsity", None)
        return values

    @classmethod
    def filled_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The given options with the sparsity that they imply."""
        values = super().filled_in(values)
        if isinstance(values.get("sparsity"), dict | list | tuple):
            if values.get("sparsity_of"):
                raise ValueError("sparsity and sparsity_of both have sparsities by hand: drop one")
            values = values | {"sparsity_of": values["sparsity"]}
            del values["sparsity"]
        values = cls._with_own_options(values)
        sparsity = values.get("sparsity")
        if values.get("masks") is not None:
            # The masks decide; 0 stands for no sparsity that was asked for.
            if sparsity not in (None, 0):
                raise ValueError(f"masks fix the zeros of every linear: drop sparsity {sparsity}")
            values = {"method": "mask", **values, "sparsity": 0.0}
        if isinstance(sparsity, str) and _PATTERN.match(sparsity):
            raise ValueError(f"sparsity is a share such as 0.5; did you mean `pattern` {sparsity}?")
        with contextlib.suppress(TypeError, ValueError):
            sparsity = float(str(sparsity))  # the command line gives text
        match = _PATTERN.match(str(values.get("pattern", "")))
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            return values
        implied = 1 - int(match[1]) / int(match[2])
        if sparsity is not None and sparsity != implied:
            raise ValueError(
                f"pattern {match[0]} already fixes the sparsity at {implied:g}; "
                f"got sparsity {sparsity} as well: give one of the two"
            )
        return {**values, "sparsity": implied}

    @classmethod
    def _with_own_options(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values with those of a method of one's own in `method_options`."""
        own = {k: v for k, v in values.items() if k not in {*cls.model_fields, *cls.ELSEWHERE}}
        if not own or values.get("method", "wanda") in METHODS:
            return values
        given = cls._read_assignments(values.get("method_options", {}))
        rest = {name: value for name, value in values.items() if name not in own}
        return rest | {"method_options": {**given, **own}}

    def changed_by(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The explicit options that still hold next to `given`.

        A new pattern brings its own sparsity, so the one that the old pattern implied is dropped.
        """
        options = super().changed_by(given)
        if "pattern" in given and self.n_of_m:
            options.pop("sparsity", None)  # This recipe's own pattern implied it.
        return options

    @field_validator("method", "allocation")
    @classmethod
    def _known_name(cls, value: str, info: ValidationInfo) -> str:
        (METHOD_NAMES if info.field_name == "method" else ALLOCATION_NAMES).check(value)
        return value

    @field_validator("group", mode="before")
    @classmethod
    def _known_group(cls, value: str | int | None) -> str | int | None:
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not is_count and value not in (None, "row", "layer", "column", "block", "block-row"):
            raise ValueError(
                "group must be row, layer, column, block, block-row or a number of rows (1 or "
                f"more); got {value!r}"
            )
        return value

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        match = _PATTERN.match(value)
        is_n_of_m = match is not None and 1 <= int(match[1]) <= int(match[2])
        if value != "unstructured" and not is_n_of_m:
            raise ValueError(
                "pattern must be 'unstructured' or N:M such as 2:4, which keeps N of every M "
                f"weights, 1 <= N <= M; got {value!r}{percent(value)}"
            )
        return value

    def check_fit(self) -> None:
        """Check that options belong to the method, to masks, and an allocation to the pattern.

        Raises:
            ValueError: It does not; says which option to drop or to add.
        """
        if self.method in METHODS:  # The plan loads the file of any other method.
            check_owners(METHODS[self.method], self)
        for name, field in type(self).model_fields.items() if self.masks is not None else ():
            if name in _CHOICES and getattr(self, name) != field.default:
                raise ValueError(f"masks fix the zeros of every linear: drop `{name}`")
        if self.masks is None and self.method == "mask":
            raise ValueError(
                "method mask removes the weights that masks name: give `masks`, a file of masks or "
                "a pruned folder"
            )
        allocates = self.allocation != "uniform"
        if self.n_of_m and (allocates or self.sparsity_of):
            raise ValueError(
                f"{f'allocation {self.allocation}' if allocates else 'sparsity_of'} distributes an "
                f"unstructured sparsity; {self.pattern} is the same in every layer: drop one of "
                "the two"
            )
        if allocates and self.sparsity_of:
            raise ValueError(
                f"allocation {self.allocation} decides the sparsity of every linear, and so does "
                "sparsity_of: drop one of the two"
            )

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(N, M), or None for unstructured sparsity.

        >>> PruningOptions(pattern="2:4").n_of_m
        (2, 4)
        """
        match = _PATTERN.match(self.pattern)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def asked_sparsity(self) -> float | None:
        """The sparsity, if it was given; None for a default."""
        return self.sparsity if "sparsity" in self.model_fields_set else None

    @property
    def measures(self) -> Literal["nothing", "loss", "inputs"]:
        """What of the dense model `allocation` reads. A rule has nothing to share at sparsity 0."""
        by_rule = self.allocation in ALLOCATION_NAMES.known
        if self.allocation == "uniform" or (by_rule and self.sparsity == 0):
            return "nothing"
        return "loss" if self.allocation == "fisher" else "inputs"


def _assignment(text: Any, form: str) -> tuple[str, str]:
    """The two parts of a text such as "power=0.5"; an error says which `form` it must have."""
    if not isinstance(text, str) or "=" not in text:
        raise ValueError(f"give {form}; got {text!r}")
    name, _, value = text.partition("=")
    return name, value
