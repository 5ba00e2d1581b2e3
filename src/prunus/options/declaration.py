"""What is known of an option, and the models that hold options. Imports no torch.

An option is a field of a pydantic model:

    class WindowOptions(Options):
        samples: Annotated[int, Option("Set the number of windows.", within=at_least(1))] = 128

Type, default, range and help are there and nowhere else. The command line makes a flag of the
field (`prunus.cli.flags`), `takes` makes it a keyword of a Python function, and `Options.read`
reads it from a TOML file and checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from prunus.options.ranges import Range
from prunus.options.toml import read_toml, to_toml

#: The panel of options that few users need. Help shows it last.
ADVANCED = "Advanced"
#: An error lists at most this many faults.
_MOST_FAULTS = 4

_Kind = TypeVar("_Kind", bound="Options")


@dataclass(frozen=True, slots=True)
class Option:
    """What is known of an option besides its type and its default.

    Attributes:
        help: Says what the option does; begins with a verb.
        metavar: Stands for the value in the help, such as "N"; None for a switch.
        panel: The group of the option in the help; None for the first group.
        within: Which values it takes; None for all of its type.
        default: The default in words, where the value None stands for a rule.
        flag: Whether the command line has it. Other options are for files and Python.
        switch: The flags of a switch that is not plain, such as "--repair/--no-repair".
        parse: Turns text of the command line into a value, or raises `ValueError`.
        suggestions: Names that a shell may complete; None for none.
        variable: An environment variable that gives the value where no flag does.
    """

    help: str
    metavar: str | None = None
    panel: str | None = None
    within: Range | None = None
    default: str | None = None
    flag: bool = True
    switch: str | None = None
    parse: Callable[[str], Any] | None = None
    suggestions: Callable[[], Iterable[str]] | None = None
    variable: str | None = None


class Options(BaseModel):
    """Options of a verb. They are checked when they are read, and do not change afterwards.

    Raises:
        pydantic.ValidationError: A `ValueError` that lists every option that is out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    #: What an error calls a file of these options.
    FILE: ClassVar[str] = "recipe"
    #: Options of other verbs that users may look for -> why this verb has none, or what has it.
    ELSEWHERE: ClassVar[dict[str, str]] = {}

    @classmethod
    def declared(cls) -> dict[str, Option]:
        """The options by name, in the order of the help: a model's own before inherited ones."""
        own = [name for name in cls.__annotations__ if name in cls.model_fields]
        found = {
            name: next((x for x in cls.model_fields[name].metadata if isinstance(x, Option)), None)
            for name in dict.fromkeys([*own, *cls.model_fields])
        }
        return {name: option for name, option in found.items() if option is not None}

    @field_validator("*")
    @classmethod
    def _is_in_range(cls, value: Any, info: ValidationInfo) -> Any:
        option = cls.declared().get(str(info.field_name))
        if option is not None and option.within is not None:
            option.within.check(str(info.field_name), value)
        return value

    @classmethod
    def read(cls, base: Options | str | Path | None, changes: Mapping[str, Any]) -> Self:
        """Options from a file or another object, with `changes` on top.

        Args:
            base: Options, the path of a TOML file, or None for the defaults.
            changes: Values by name. None leaves the option as it is.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not TOML, an option is unknown or out of range, or options
                exclude each other.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        if isinstance(base, cls):
            if not given:
                return base
            return _checked(cls, base.changed_by(given) | given, "")
        if isinstance(base, Options):
            raise ValueError(f"a {type(base).__name__} was given where a {cls.__name__} is needed")
        values = read_toml(Path(base), f"{cls.FILE} file") if base is not None else {}
        return _checked(cls, values | given, f"{cls.FILE} {base}: " if base is not None else "")

    def changed_by(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options that were given explicitly and that still hold next to `given`."""
        return self.model_dump(exclude_unset=True)

    @classmethod
    def pick(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split keywords into those that are options of this model, and the others."""
        own = {name: value for name, value in values.items() if name in cls.model_fields}
        return own, {name: value for name, value in values.items() if name not in own}

    def to_toml(self) -> str:
        """The options as TOML, as `read` reads them. Options without a value are left out."""
        return to_toml(self.model_dump())


def _checked(kind: type[_Kind], values: dict[str, Any], where: str) -> _Kind:
    try:
        return kind(**values)
    except ValidationError as fault:
        raise ValueError(where + explain(fault, kind)) from None


def explain(fault: ValidationError, kind: type[BaseModel]) -> str:
    """The faults of options in one sentence that names each option."""
    faults = [_explain_one(error, kind) for error in fault.errors()]
    more = len(faults) - _MOST_FAULTS
    return "; ".join([*faults[:_MOST_FAULTS], *([f"and {more} more"] if more > 0 else [])])


def _explain_one(error: Any, kind: type[BaseModel]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    elsewhere: dict[str, str] = getattr(kind, "ELSEWHERE", {})
    if name in elsewhere:
        return f"{name} is not an option here: {elsewhere[name]}"
    if error["type"] == "extra_forbidden":
        fields = kind.model_fields
        for part in error["loc"][:-1]:
            inner = getattr(fields.get(str(part)), "annotation", None)
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                fields = inner.model_fields
        return f"unknown option {name!r}; known are {', '.join(fields)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    if error["type"] == "missing":
        return f"{name} is missing"
    return f"{name}: {message.lower()} (got {_brief(error['input'])})"


def _brief(value: Any) -> str:
    """A value as an error shows it: as it is if it is short, otherwise what it is.

    >>> _brief("2:5"), _brief(list(range(1000)))
    ("'2:5'", 'a list')
    """
    if hasattr(value, "shape"):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 200 else f"a {type(value).__name__}"
