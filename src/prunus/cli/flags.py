"""Flags of a command, made from the declarations of its options, and those that commands share.

Typer reads a function's signature. So a command that ends in `**options` gets the fields of its
models as parameters in their place (`with_flags`). A value of None means that the user gave no such
flag, and the model decides. `opt` declares an option that only one command has.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic_core import PydanticUndefined

from prunus.options import ADVANCED, Option, Options

#: Names of all options that are flags, for messages.
FLAGS: set[str] = set()
_Names = Collection[str]
#: The name of an option, as messages of the library write it.
_NAME = re.compile(r"`([a-z][a-z_0-9]*)`")
#: The argument for one model.
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint folder, hub id, or GGUF file.")
]
#: The argument for the folder of the result.
Output = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the result.")]
#: The option of all commands that give figures.
JSON = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Also write all figures to FILE as JSON. A FILE of - is standard output.",
    ),
]
#: The option of all commands that show progress.
QUIET = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", show_default=False, help="Show the result and errors, no progress."
    ),
]
#: The option of all commands that carry out a recipe.
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE.toml",
        rich_help_panel=ADVANCED,
        help="Read options from a file; flags override it. Options without a flag are given there.",
    ),
]


def with_flags(
    *models: type[Options], without: _Names = (), only: _Names = (), rare: _Names = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that ends in `**options` a flag for each option of its models.

    Parameters that the command has itself stay, and no flag of the same name is added.

    Args:
        models: Classes whose fields are declared as options. Of two with one name the first counts.
        without: Names of options that the command does not take.
        only: Names of the only options that the command takes; empty for all.
        rare: Names of options that the help shows in its last panel.

    Returns:
        A decorator, which changes the signature of the command and leaves its code.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hidden = {*without, *inspect.signature(command).parameters}
        added: dict[str, Any] = {}
        for model in models:
            for name, option in model.declared().items():
                if option.flag and name not in hidden | {*added} and (not only or name in only):
                    panel = ADVANCED if name in rare else option.panel
                    added[name] = _flag(name, option, model.model_fields[name], panel)
        return add_parameters(command, added)

    return decorate


def add_parameters(
    function: Callable[..., None], added: dict[str, Any], *, last: bool = False
) -> Callable[..., None]:
    """Let typer see more parameters of a function, and return the function.

    Args:
        function: Its `**options` disappear from the signature.
        added: Name of a parameter -> its annotation, with the default None.
        last: Put them at the end, rather than before the keyword-only parameters of `function`.
    """
    signature = inspect.signature(function, eval_str=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    present = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    index = len(present) if last else sum(p.kind is not keyword for p in present)
    new = [inspect.Parameter(x, keyword, default=None, annotation=added[x]) for x in added]
    parameters = [*present[:index], *new, *present[index:]]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def as_flags(message: str) -> str:
    """A message of the library with the names of options as flags.

    >>> FLAGS.add("head_bits")
    >>> as_flags("raise `head_bits` of `config.json`")
    'raise --head-bits of `config.json`'
    """
    return _NAME.sub(
        lambda name: f"--{name[1].replace('_', '-')}" if name[1] in FLAGS else name[0], message
    )


def _flag(name: str, option: Option, field: Any, panel: str | None) -> Any:
    """The type of an option for typer, with its help."""
    spelled = option.switch or f"--{name.replace('_', '-')}"
    default = option.default or _words(field.get_default(call_default_factory=True))
    text = option.help + (f" Default: {default}." if default else "")
    return Annotated[
        _kind(field.annotation) | None,
        typer.Option(
            spelled,
            *option.aliases,
            metavar=option.metavar,
            help=text,
            rich_help_panel=panel,
            show_default=False,
            autocompletion=option.suggestions and _completion(option.suggestions),
        ),
    ]


def _kind(annotation: Any) -> Any:
    """What typer reads for a field: a plain type, or text such as a number for the model."""
    parts = [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
    if len(parts) > 1:
        return str
    if get_origin(parts[0]) in (tuple, dict):
        return list[str]
    is_choice = get_origin(parts[0]) is Literal
    return parts[0] if is_choice or parts[0] in (bool, Path) else str


def _words(default: Any) -> str:
    """A default in the help; nothing for a switch that is off, or where there is no default."""
    if default is False or default in ((), {}, None, PydanticUndefined):
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def _completion(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What a shell offers for a value: the suggestions that begin as the user has typed."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def opt(text: str, metavar: str | None = None, names: tuple[str, ...] = (), **more: Any) -> Any:
    """An option of a single command.

    Args:
        text: Its help, with the default in words.
        metavar: What stands for its value in the help; None for a switch.
        names: Its flags; empty for the one that typer makes of the parameter's name.
        more: More arguments of `typer.Option`.
    """
    return typer.Option(*names, metavar=metavar, help=text, show_default=False, **more)
