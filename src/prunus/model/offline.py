"""A time in which nothing is downloaded from the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def no_downloads() -> Iterator[None]:
    """While active, the hub is not asked, as with the environment variable HF_HUB_OFFLINE.

    What was downloaded earlier is still found.

    >>> from huggingface_hub.constants import is_offline_mode
    >>> with no_downloads():
    ...     is_offline_mode()
    True
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
