"""The options that prune and compress share: which linears, and how weights are updated.

Options that only decide how the work is done, such as the memory budget or the device, are
`prunus.engine.run_options.RunOptions`. They may change between a run and its resumption. Imports no
torch.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import model_validator

from prunus.engine.run_options import WindowOptions
from prunus.methods.allocation import check_glob
from prunus.methods.method_options import UpdateOptions
from prunus.options import Option, at_least
from prunus.words import did_you_mean

#: Heading of these options in --help.
SELECTION = "Allocation and selection"


@dataclass(frozen=True)
class ExtraSteps:
    """What a run does beside changing each linear of the blocks once.

    Attributes:
        reconstruct: The blocks whose remaining weights are trained towards the dense model.
        before: Whether weights are trained before they are changed, and not afterwards.
        epochs: The epochs of that training; None chooses them by the number of tokens.
        two_passes: Whether windows run twice through each block, as in the original code of Wanda.
        head: Whether the output head is pruned too.
    """

    reconstruct: Literal["none", "last", "all"] = "none"
    before: bool = False
    epochs: int | None = None
    two_passes: bool = False
    head: bool = False


class LinearOptions(UpdateOptions, WindowOptions):
    """What prune and compress have in common: the linears, and how weights are updated.

    Attributes:
        only: Name patterns. Only linears that match one of them are changed; () for all.
        ignore: Name patterns. Linears that match one of them stay as they are.
        min_expert_tokens: If fewer tokens reach an expert, its statistics are those of all tokens;
            0 always uses the expert's own, and None lets the method decide.

    >>> LinearOptions(only=["*.mlp.*"]).selects("model.layers.0.mlp.up_proj")
    True
    """

    only: Annotated[
        tuple[str, ...],
        Option(
            "Change only linears whose names match; may be repeated.",
            metavar="GLOB",
            panel=SELECTION,
            is_condition=True,
        ),
    ] = ()
    ignore: Annotated[
        tuple[str, ...],
        Option(
            "Leave linears whose names match as they are; may be repeated.",
            metavar="GLOB",
            panel=SELECTION,
            is_condition=True,
        ),
    ] = ()
    min_expert_tokens: Annotated[
        int | None,
        Option(
            "If fewer tokens than this reach an expert, use all tokens for its statistics.",
            flag=False,
            within=at_least(0, ", where 0 always uses an expert's own tokens"),
            default="by the method",
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        # Of a damaged record it is no dict, which pydantic refuses next.
        return cls.filled_in(values) if isinstance(values, dict) else values

    @classmethod
    def filled_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The given options with those that follow from them."""
        return values

    @model_validator(mode="after")
    def _options_fit_together(self) -> LinearOptions:
        self.check_fit()
        return self

    def check_fit(self) -> None:
        """Check that the options fit together by the rules of a command.

        Raises:
            ValueError: They do not; says which option to drop or to add.
        """

    @property
    def extras(self) -> ExtraSteps:
        """What only prune does; its recipe has options for it."""
        return ExtraSteps()

    @property
    def measures(self) -> Literal["nothing", "loss", "inputs"]:
        """What of the dense model the sparsity of each linear follows from."""
        return "nothing"

    @property
    def rounds(self) -> str:
        """How weights become integers; see `rounding_method`."""
        return "none"

    def selects(self, name: str) -> bool:
        """Whether the linear `name` (its full path in the model) is to be changed."""
        wanted = not self.only or any(fnmatch.fnmatchcase(name, glob) for glob in self.only)
        return wanted and not any(fnmatch.fnmatchcase(name, glob) for glob in self.ignore)

    def check_names(self, names: Iterable[str]) -> None:
        """Check that every name pattern matches: a typing error would prune the wrong linears.

        Args:
            names: Full names of all linears of the model.

        Raises:
            ValueError: A pattern of `only` or `ignore` matches no linear, or no linear is left.
        """
        names = list(names)
        for option, globs in (("only", self.only), ("ignore", self.ignore)):
            for glob in globs:
                check_glob(option, glob, names)
        if not any(self.selects(name) for name in names):
            raise ValueError("`only` and `ignore` leave no linear to prune")


class PresetOptions(LinearOptions):
    """Options of a command that has presets.

    Attributes:
        PRESETS: Name -> options, which are chosen by measurement.
        preset: One of these names; None for none.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    preset: Annotated[
        str | None,
        Option(
            "Take a tested set of options: fast, balanced or best. Explicit options override a "
            "preset.",
            metavar="PRESET",
            suggestions=lambda: ("fast", "balanced", "best"),
        ),
    ] = None

    @classmethod
    def filled_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The given options on top of those of their preset.

        Raises:
            ValueError: The preset is unknown.
        """
        name = values.get("preset")
        if name is not None and name not in cls.PRESETS:
            raise ValueError(
                f"the preset {name!r} is unknown: choose one of {', '.join(cls.PRESETS)}"
                f"{did_you_mean(name, cls.PRESETS)}"
            )
        return super().filled_in(cls.PRESETS.get(str(name), {}) | values)

    def changed_by(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The explicit options that still hold next to `given`.

        Raises:
            ValueError: `given` has a preset, which would not fill in what these options have
                filled in already.
        """
        if "preset" in given:
            raise ValueError(
                f"preset={given['preset']!r} next to a {type(self).__name__}: a preset fills in "
                f"what it leaves open. Give it to the {type(self).__name__} instead"
            )
        return super().changed_by(given)
