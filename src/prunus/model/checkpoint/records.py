"""Records next to results, as JSON: how to read one, and how to refuse one of other work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from prunus.model.checkpoint.atomic_files import read_json

__all__ = ["check_same_work", "read_record"]

_Record = TypeVar("_Record", bound=BaseModel)


def read_record(path: Path, kind: type[_Record]) -> _Record:
    """The record in the file `path`, which must exist.

    Raises:
        ValueError: it is damaged or of another version; names the first fault.
    """
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"{path} is damaged or of another version: {where}: {first['msg']}"
        ) from fault


def check_same_work(before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Check that the record of a folder agrees with the work to do, so that it can be resumed.

    >>> check_same_work({"seed": 0, "blocks": 3}, {"seed": 0}, "run")
    >>> check_same_work({"seed": 0}, {"seed": 1}, "run")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    FileExistsError: the output folder holds a run with another seed (0, now 1); it is left ...
    """
    for key, value in now.items():
        if before[key] != value:
            raise FileExistsError(
                f"the output folder holds a {what} with another {key} ({before[key]!r}, now "
                f"{value!r}); it is left as it is. Choose another folder, or `overwrite` to "
                "replace it"
            )
