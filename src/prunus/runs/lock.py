"""The lock on the folder of a result, for a run of one or several ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from prunus.distributed import Ranks
from prunus.model.checkpoint.lock import locked

__all__ = ["locked_output"]


@contextlib.contextmanager
def locked_output(folder: Path, ranks: Ranks, look: Callable[[], object]) -> Iterator[None]:
    """Hold a folder against other runs for the length of a `with` block.

    Only rank 0 touches the folder. All ranks must enter the block, and all fail if rank 0 does.

    Args:
        folder: The folder of the result; it need not exist.
        ranks: The processes of the run.
        look: Raises an error for a folder that the run cannot use. It is called before anything is
            written there, so that a folder of somebody else stays untouched. What it finds decides
            nothing more: call it again in the block, because another run may finish in between.

    Raises:
        FileExistsError: Another run holds the folder.
        OSError: The folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with ranks.fail_together():
            if ranks.rank == 0:
                look()
                stack.enter_context(locked(folder))
        yield
