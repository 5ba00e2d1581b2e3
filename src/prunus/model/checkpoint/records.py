"""Records that lie beside results as JSON: how one is read, and how one of other work is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from prunus.model.checkpoint.atomic_files import read_json

__all__ = ["check_alike", "read_record"]

_Record = TypeVar("_Record", bound=BaseModel)


def read_record(path: Path, kind: type[_Record]) -> _Record:
    """The record in the file `path`, which exists.

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


def check_alike(before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """See that a folder's record has every value of `now`.

    Args:
        before: of the work that the folder holds.
        now: of the work that is asked for.
        what: a word for the work.

    Raises:
        FileExistsError: names the first difference.
    """
    for key, value in now.items():
        if before[key] != value:
            raise FileExistsError(
                f"the output folder holds a {what} with another {key} ({before[key]!r}, now {value!r}); it is left "
                "as it is. Choose another folder, or --overwrite to replace it"
            )
