"""Flags of a verb, made from the declarations of its options.

Typer reads a function's signature. So a verb that ends in `**options` gets the fields of its models
as parameters in their place. A flag that is not given is None, and the model decides.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from prunus.options import Option, Options
from prunus.options.declaration import ADVANCED

#: Names of all options that are flags, for messages.
FLAGS: set[str] = set()
_NAME = re.compile(r"`([a-z][a-z_0-9]*)`")

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
    *models: type[Options], without: Collection[str] = (), only: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb that ends in `**options` one flag for each option of its models.

    Args:
        *models: Models of options. A parameter of the verb hides an option of the same name.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(verb, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        hidden = {*without, *(parameter.name for parameter in own)}
        added = []
        for model in models:
            for name, option in model.declared().items():
                if option.flag and name not in hidden and (not only or name in only):
                    hidden.add(name)
                    flag = _flag(name, option, model.model_fields[name])
                    kind = inspect.Parameter.KEYWORD_ONLY
                    added.append(inspect.Parameter(name, kind, default=None, annotation=flag))
        first = [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
        last = [p for p in own if p.kind is p.KEYWORD_ONLY]

        @functools.wraps(verb)
        def with_options(*arguments: Any, **options: Any) -> None:
            verb(*arguments, **options)

        parameters = [*first, *added, *last]
        with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_options

    return decorate


def as_flags(message: str) -> str:
    """A message of the library with the names of options as flags.

    >>> FLAGS.add("head_bits")
    >>> as_flags("raise `head_bits` of `config.json`")
    'raise --head-bits of `config.json`'
    """
    return _NAME.sub(
        lambda found: f"--{found[1].replace('_', '-')}" if found[1] in FLAGS else found[0], message
    )


def _flag(name: str, option: Option, field: Any) -> Any:
    """The type of an option for typer, with its help."""
    kind = _kind(field.annotation) if option.parse is None else str
    spelled = option.switch or f"--{name.replace('_', '-')}"
    default = option.default or _words(field.get_default(call_default_factory=True))
    text = option.help + (f" Default: {default}." if default else "")
    parser = None if option.parse is None else _parser(option.parse)
    return Annotated[
        kind | None,
        typer.Option(
            spelled,
            metavar=option.metavar,
            help=text,
            rich_help_panel=option.panel,
            show_default=False,
            envvar=option.variable,
            parser=parser,
            autocompletion=option.suggestions and _completion(option.suggestions),
        ),
    ]


def _kind(annotation: Any) -> Any:
    """What typer reads for a field: a plain type, or text that the model reads itself."""
    parts = [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [each for each in get_args(annotation) if each is not type(None)]
    if len(parts) > 1:
        return str
    if get_origin(parts[0]) is tuple:
        return list[str]
    return parts[0] if parts[0] in (bool, int, float, str, Path) or _is_choice(parts[0]) else str


def _is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _words(default: Any) -> str:
    """A default in the help; nothing for a switch that is off, or where there is none."""
    if default is None or default is False or default == ():
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def _completion(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def _parser(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as fault:
            raise typer.BadParameter(as_flags(str(fault))) from None

    return parsed


def opt(
    text: str,
    metavar: str | None = None,
    names: tuple[str, ...] = (),
    panel: str | None = None,
    **more: Any,
) -> Any:
    """An option of a single verb. Its default is in the help, in words.

    Args:
        metavar: Stands for the value in the help; None for a switch.
        names: Its flags, where they are not those that typer makes.
    """
    return typer.Option(
        *names, metavar=metavar, help=text, rich_help_panel=panel, show_default=False, **more
    )
