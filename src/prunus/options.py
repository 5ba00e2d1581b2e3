"""What is declared of an option, and the models that hold options. Imports no torch.

An option is a field of a pydantic model:

    class WindowOptions(Options):
        samples: Annotated[int, Option("Set the number of windows.", within=at_least(1))] = 128

Type, default, range and help are there and nowhere else. The command line makes a flag of the
field (`prunus.cli.flags`), `takes` makes it a keyword of a Python function, and `Options.read`
reads it from a TOML file and checks it.

The order of this file: the declaration of one option, models of options, what errors say, ranges of
values, TOML, and keywords of functions.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from prunus.model.checkpoint.files import read_limited
from prunus.words import did_you_mean, known, reason

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

#: The panel of options that few users need. Help shows it last.
ADVANCED = "Advanced"
#: An error lists at most this many faults.
_MOST_FAULTS = 4
#: The beginning of pydantic's name of an error -> what the value must be.
_NUMBERS = {"float": "a number", "int": "a whole number"}


@dataclass(frozen=True, slots=True)
class Option:
    """What is declared of an option besides its type and its default."""

    help: str  #: says what the option does; begins with a verb
    metavar: str | None = None  #: stands for the value in the help, such as "N"; None for a switch
    panel: str | None = None  #: the group of the option in the help; None for the first group
    within: Range | None = None  #: which values it takes; None for all of its type
    default: str | None = None  #: the default in words, where the value None stands for a rule
    flag: bool = True  #: whether the command line has it. Other options are for files and Python.
    #: The flags of a switch that is not plain, such as "--repair/--no-repair".
    switch: str | None = None
    aliases: tuple[str, ...] = ()  #: other names of the flag, which other programs use
    #: Names that a shell may complete; None for none.
    suggestions: Callable[[], Iterable[str]] | None = None
    #: Whether it says what is asked for, and not by which method it is reached. Results of two
    #: methods can only be compared where all conditions are equal.
    is_condition: bool = False


#: Options whose values may be names of files; a method may be FILE.py:NAME.
_NAMING_FILES = (
    "allocation", "calibration", "fast_on", "masks", "method", "template", "text", "types_from",
)  # fmt: skip


class _OptionsType(ModelMetaclass):
    """Lets a model of options say in one sentence what is wrong, where pydantic has a list."""

    def __call__(self, *positional: Any, **values: Any) -> Any:
        try:
            return super().__call__(*positional, **values)
        except ValidationError as fault:
            raise ValueError(explain(fault, cast(Any, self))) from None


class Options(BaseModel, metaclass=_OptionsType):
    """Options of a command, checked when they are read, then fixed.

    A subclass declares its options as fields, see the top of this file. Fields without an `Option`
    are read from files too, but they have no flag and no keyword.

    Raises:
        ValueError: An option is unknown or out of range, or options exclude each other; the message
            names each of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    #: What an error calls a file of these options.
    FILE: ClassVar[str] = "recipe"
    #: Options of other commands that users may look for -> why this command has none, or what has
    #: it.
    ELSEWHERE: ClassVar[dict[str, str]] = {}

    @classmethod
    def declared(cls) -> dict[str, Option]:
        """The options by name, in the order of the help: a model's own before inherited ones.

        An inherited option with another default stays in its place.
        """
        names = [name for kind in cls.__mro__ for name in vars(kind).get("__annotations__", ())]
        return {
            name: declaration
            for name in [*dict.fromkeys(reversed(names))][::-1]
            if name in cls.model_fields
            for declaration in cls.model_fields[name].metadata
            if isinstance(declaration, Option)
        }

    @classmethod
    def names_of(cls, has: Callable[[Option], bool]) -> set[str]:
        """The names of the declared options for which `has` is true.

        Args:
            has: A question about a declaration, such as whether it is a condition.
        """
        return {name for name, option in cls.declared().items() if has(option)}

    @classmethod
    def lists(cls) -> set[str]:
        """The names of the options whose value is a list."""
        return {name for name, x in cls.model_fields.items() if get_origin(x.annotation) is tuple}

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
        changes = {name: value for name, value in changes.items() if value is not None}
        if isinstance(base, cls):
            if not changes:
                return base
            return cls(**(base.changed_by(changes) | changes))
        if isinstance(base, Options):
            raise ValueError(f"a {type(base).__name__} was given where a {cls.__name__} is needed")
        if base is None:
            return cls(**changes)
        values = read_toml(Path(base), f"{cls.FILE} file")
        try:
            return cls(**(values | changes))
        except ValueError as fault:
            raise ValueError(f"{cls.FILE} {base}: {fault}") from None

    def changed_by(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The options that were set explicitly and that still hold next to `changes`.

        A subclass drops those that `changes` replaces, such as a sparsity that a pattern implies.

        Args:
            changes: The new values by name.
        """
        return self.model_dump(exclude_unset=True)

    @classmethod
    def pick(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split keywords into those that are options of this model, and the others.

        Args:
            values: Values by name.

        Returns:
            (options of this model, all others), both by name.
        """
        options = {name: value for name, value in values.items() if name in cls.model_fields}
        return options, {name: value for name, value in values.items() if name not in options}

    def without_folders(self) -> Self:
        """The options as stored in a published file: names of other files without their folder."""
        given = {name: getattr(self, name, None) for name in _NAMING_FILES}
        update = {name: type(value)(Path(value).name) for name, value in given.items() if value}
        return self.model_copy(update=update)

    def to_toml(self) -> str:
        """The options as TOML, as `read` reads them.

        Options whose value is None are left out, because TOML has no such value.
        """
        values = self.model_dump().items()
        return "".join(f"{name} = {_toml(value)}\n" for name, value in values if value is not None)


def explain(fault: ValidationError, kind: type[BaseModel]) -> str:
    """The faults of options in one sentence that names each option.

    Args:
        fault: What pydantic raised.
        kind: The model of the options, whose fields are the options that exist.
    """
    faults = [_explain_one(error, kind) for error in fault.errors()]
    # The list of the known options is long: once is enough.
    for index in reversed(range(1, len(faults))):
        message, mark, names = faults[index].partition("; known are ")
        if mark and any(earlier.endswith(mark + names) for earlier in faults[:index]):
            faults[index] = message
    more = len(faults) - _MOST_FAULTS
    return "; ".join([*faults[:_MOST_FAULTS], *([f"and {more} more"] if more > 0 else [])])


def _explain_one(error: Any, kind: type[BaseModel]) -> str:
    """One of pydantic's errors (a dict of `ValidationError.errors`) in words for people."""
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
        return f"unknown option {name!r}{known(error['loc'][-1], fields)}"
    message = words(error)
    if error["type"] == "value_error":
        table = ".".join(str(part) for part in error["loc"][:-1])
        return f"{table}: {message}" if table else message
    if error["type"] == "missing":
        return f"{name} is missing"
    number = _NUMBERS.get(error["type"].partition("_")[0])
    said = f"{name} must be {number}" if number else f"{name}: {message.lower()}"
    # pydantic lists the choices of a name as 'a', 'b' or 'c'.
    choices = str(error.get("ctx", {}).get("expected", "")).split("'")[1::2]
    hint = did_you_mean(error["input"], choices)
    if not hint and number != _NUMBERS["int"]:
        hint = percent(error["input"])
    return f"{said} (got {_brief(error['input'])}){hint}"


def words(error: Mapping[str, Any]) -> str:
    """The message of one of pydantic's errors, without the prefix that it gives to ours."""
    return str(error["msg"]).removeprefix("Value error, ")


def percent(value: Any) -> str:
    """A hint for a share that was given in percent; empty for any other value.

    >>> percent(50), percent("50%"), percent(0.5)
    ('; did you mean 0.5?', '; did you mean 0.5?', '')
    """
    text = str(value)[:40]
    with contextlib.suppress(ValueError):
        number = float(text.removesuffix("%"))
        if (number > 1 or text.endswith("%")) and 0 < number < 100:
            return f"; did you mean {number / 100:g}?"
    return ""


def _brief(value: Any) -> str:
    """A value as an error shows it: as it is if it is short, otherwise what it is.

    >>> _brief("2:5"), _brief(list(range(1000)))
    ("'2:5'", 'a list')
    """
    if hasattr(value, "shape"):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 200 else f"a {type(value).__name__}"


@dataclass(frozen=True, slots=True)
class Range:
    """Which values an option takes."""

    allows: Callable[[Any], bool]  #: whether a value is in the range
    must: str  #: the range in words, after "must": "lie in (0, 1)"
    of_shares: bool = False  #: whether an error asks if the value was meant in percent
    choices: Sequence[Any] = ()  #: all values, of a range that is a list

    def check(self, name: str, value: Any) -> None:
        """Check the value of the option `name`. None stands for the default and passes.

        Raises:
            ValueError: The value is out of the range; the message says what it must be.

        >>> at_least(1).check("samples", 0)
        Traceback (most recent call last):
        ValueError: samples must be at least 1; got 0
        """
        if value is not None and not self.allows(value):
            hint = percent(value) if self.of_shares else did_you_mean(value, map(str, self.choices))
            shown = f"{value:g}" if isinstance(value, float) else repr(value)
            raise ValueError(f"{name} must {self.must}; got {shown}{hint}")


def at_least(minimum: int, what: str = "") -> Range:
    """The range of a count: `minimum` or more.

    Args:
        minimum: The lowest value.
        what: Continues the sentence of an error, after the number.

    >>> at_least(2, " tokens").must
    'be at least 2 tokens'
    """
    return Range(lambda value: value >= minimum, f"be at least {minimum}{what}")


def between(text: str, what: str = "") -> Range:
    """The range of a number in an interval such as "(0, 1)" or "[0, 1)".

    A bracket includes its end, a parenthesis excludes it. No interval includes NaN.

    Args:
        text: The interval.
        what: Continues the sentence of an error, after the interval.

    >>> between("[0, 1)").allows(0), between("[0, 1)").allows(1)
    (True, False)
    """
    low, high = (float(end) for end in text[1:-1].split(","))

    def allows(value: float) -> bool:
        above = value >= low if text[0] == "[" else value > low
        below = value <= high if text[-1] == "]" else value < high
        return above and below

    return Range(allows, f"lie in {text}{what}", of_shares=high == 1)


def one_of(choices: Sequence[Any]) -> Range:
    """The range of a name or a number in a list.

    >>> one_of((4, 6, 8)).must
    'be 4, 6 or 8'
    """
    listed = f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}"
    return Range(lambda value: value in choices, f"be {listed}", choices=choices)


_MAX_BYTES = 2**18  # of a TOML file
#: A key of more than sixteen parts. Python's parser takes time and memory of the square of them.
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?>[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){16}""")


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The values of a TOML file by name; tables are dicts.

    A file may come from anywhere, so its size and the length of its keys are limited before it is
    parsed.

    Args:
        path: The file.
        what: What an error calls the file, such as "recipe file".

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is too large, not UTF-8, or not TOML.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(
                f"{what} {path} has {path.stat().st_size:,} bytes, and at most {_MAX_BYTES:,} are "
                "read; is it the right file?"
            )
        text = read_limited(path).decode("utf-8")
        long_key = _LONG_KEY.search(text)
        if long_key is not None:
            raise ValueError(
                f"{what} {path} has a key of more than sixteen parts: {long_key[0][:40]}…; is it "
                "the right file?"
            )
        return tomllib.loads(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {what} {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise ValueError(f"{what} {path} is not valid TOML: {reason(fault)}") from fault


def _toml(value: Any) -> str:
    """A truth value, a number, a text, or a list or table of them as TOML writes it.

    >>> _toml(("c4", "wikitext2")), _toml(True)
    ('["c4", "wikitext2"]', 'true')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | Path):
        # JSON and TOML escape equally, except for DEL, which only TOML escapes.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(x)}" for key, x in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes(
    *models: type[Options], without: Collection[str] = ()
) -> Callable[[_Function], _Function]:
    """Give a function that ends in `**options` the fields of `models` as keywords.

    It still gets them in `options`. Its docstring gets a line per keyword, its signature type and
    default. A parameter of its own hides an option of the same name.

    Args:
        *models: The models, in the order in which their options are listed.
        without: Names of options that the function does not take.

    Returns:
        A decorator.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {*without, *(parameter.name for parameter in parameters)}
        lines = []
        for model in models:
            declared = model.declared()
            for name, field in model.model_fields.items():
                if name in names or name not in declared:
                    continue
                names.add(name)
                annotation = inspect.formatannotation(field.annotation).replace("typing.", "")
                parameters.append(
                    inspect.Parameter(
                        name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=field.get_default(call_default_factory=True),
                        annotation=annotation,
                    )
                )
                lines.append(f"    {name}: {declared[name].help}")

        @functools.wraps(function)
        def called(*arguments: Any, **options: Any) -> Any:
            return function(*arguments, **options)

        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        doc = inspect.cleandoc(function.__doc__ or "")
        called.__doc__ = doc + ("\n\nOptions:\n" + "\n".join(lines) if lines else "") + "\n"
        return cast(_Function, called)

    return decorate
