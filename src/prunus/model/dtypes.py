"""The dtypes of a computation, by the names that users give."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "check_dtype"]

#: The dtypes that users can name, for computation and storage.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(name: str) -> None:
    """See that `name` is "auto" or one of `DTYPES`.

    Raises:
        ValueError: it is not; names those.
    """
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, not {name!r}")
