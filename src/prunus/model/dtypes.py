"""The dtypes of a computation, by the names that users give."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "check_dtype"]

#: The dtypes that users can name, for computation and storage.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(name: str) -> None:
    """Check that `name` is "auto" or one of `DTYPES`.

    Raises:
        ValueError: it is not; lists the names.

    >>> check_dtype("bfloat16")
    >>> check_dtype("int8")
    Traceback (most recent call last):
    ...
    ValueError: dtype must be one of auto, float32, bfloat16, float16, not 'int8'
    """
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, not {name!r}")
