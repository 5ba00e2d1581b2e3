"""Options as the keywords of a Python function: what `help` and editors show."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

from prunus.options.declaration import Options

_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes(
    *models: type[Options], without: Collection[str] = ()
) -> Callable[[_Function], _Function]:
    """Give a function that ends in `**options` the fields of `models` as keywords.

    The function itself still gets them in `options`. Its docstring gets a line per keyword, and its
    signature names each one with its type and default.

    Args:
        *models: The options that the function takes. A parameter of its own hides an option of the
            same name.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {*without, *(parameter.name for parameter in own)}
        added, lines = [], []
        for model in models:
            declared = model.declared()
            for name, field in model.model_fields.items():
                if name in names or name not in declared:
                    continue
                names.add(name)
                kind = inspect.formatannotation(field.annotation).replace("typing.", "")
                added.append(
                    inspect.Parameter(
                        name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=field.get_default(call_default_factory=True),
                        annotation=kind,
                    )
                )
                lines.append(f"    {name}: {declared[name].help}")

        @functools.wraps(function)
        def called(*arguments: Any, **options: Any) -> Any:
            return function(*arguments, **options)

        called.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        doc = inspect.cleandoc(function.__doc__ or "")
        called.__doc__ = doc + ("\n\nOptions:\n" + "\n".join(lines) if lines else "") + "\n"
        return cast(_Function, called)

    return decorate
