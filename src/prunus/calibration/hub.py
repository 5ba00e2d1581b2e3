"""Data sets of the library `datasets`, from the hub or from rows. Only this file uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["as_dataset", "load_column"]


def load_column(
    name: str, arguments: dict[str, Any], split: str, column: str, local: str
) -> Sequence[str]:
    """One column of a split of a data set on the hub, which reads a row when it is indexed.

    Args:
        name: of the corpus, for the message.
        arguments: of `datasets.load_dataset`, apart from the split.
        split, column: of the data set.
        local: the file of local datasets that would do as well, for the message.

    Raises:
        OSError: the hub does not answer, or has no such data set.
    """
    import datasets

    try:
        # The column is not a list: a shard of C4 never lies in memory as Python strings.
        documents: Sequence[str] = datasets.load_dataset(**arguments, split=split)[column]
    except Exception as error:  # the library raises errors of many kinds: network, cache, its own
        raise OSError(
            f"{name} could not be loaded from the hub ({type(error).__name__}: {error}). "
            f"Without a network, give a data folder (--data or PRUNUS_DATA) that holds {local}"
        ) from error
    return documents


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    """Rows with equal columns as a `datasets.Dataset` in memory."""
    import datasets

    return datasets.Dataset.from_list(rows)
