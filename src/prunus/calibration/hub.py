"""Data sets of the library `datasets`, from the hub or from files. Only this file uses it."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

#: The longest wait for a connection to the hub. The library itself retries for more than a minute.
_CONNECT_SECONDS = 5.0


def load_column(
    name: str, arguments: dict[str, Any], split: str, column: str, local: str
) -> Sequence[str]:
    """One column of a split of a data set on the hub, which reads a row when it is indexed.

    Where the hub cannot be reached, only what was downloaded earlier is used.
    """
    import datasets

    try:
        with _offline_unless_reachable():
            # The column is not a list: a shard of C4 never lies in memory as Python strings.
            documents: Sequence[str] = datasets.load_dataset(**arguments, split=split)[column]
    except Exception as error:  # the library raises errors of many kinds: network, cache, its own
        raise OSError(
            f"{name} could not be loaded from the hub ({type(error).__name__}: {error}). These "
            "sources need no network: python-docs, a file of text, self (calibration only), and a "
            f"data folder (`data` or PRUNUS_DATA) that holds {local}"
        ) from error
    return documents


@contextlib.contextmanager
def _offline_unless_reachable() -> Iterator[None]:
    """Keep the library from waiting for a hub that cannot be reached, while the context is open."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or not _answers(config.HF_ENDPOINT)
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    """Whether a connection to a web address can be opened. Behind a proxy only a request tells."""
    if urllib.request.getproxies():
        return True
    url = urlsplit(address)
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), _CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def json_rows(path: Path) -> Any:
    """The rows of a file of JSON lines as a `datasets.Dataset` in memory.

    Raises:
        Exception: the library raises errors of many kinds for damaged files.
    """
    import datasets

    with tempfile.TemporaryDirectory() as scratch:
        return datasets.load_dataset(
            "json", data_files=str(path), split="train", cache_dir=scratch, keep_in_memory=True
        )
