"""Data sets as the `datasets` library has them: from the hub, or made of rows. The one file that knows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["as_dataset", "load_column"]


def load_column(
    name: str, arguments: dict[str, Any], split: str, column: str, local: str
) -> Sequence[str]:
    """One column of a split of a data set on the hub, read row by row when it is indexed.

    Args:
        name: what users call the corpus.
        arguments: of `datasets.load_dataset`, but for the split.
        split, column: which.
        local: the file of a data folder that would do as well; named in the error.

    Raises:
        OSError: the hub does not answer, or has no such data set.
    """
    import datasets

    try:
        # A shard of C4 never lies in memory as Python strings.
        documents: Sequence[str] = datasets.load_dataset(**arguments, split=split)[column]
    except (
        Exception
    ) as error:  # the library raises many kinds: network, cache, missing files, its own
        raise OSError(
            f"{name} could not be loaded from the hub ({type(error).__name__}: {error}). "
            f"Without a network, give a data folder (--data or PRUNUS_DATA) that holds {local}"
        ) from error
    return documents


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    """Rows, which must agree in their columns, as a `datasets.Dataset` in memory."""
    import datasets

    return datasets.Dataset.from_list(rows)
