"""Runs that are interrupted after a given number of blocks."""


class StopError(Exception):
    """Interrupts a run from its progress callback."""


def stop_after(blocks: int):
    def progress(step):
        if step.done == blocks:
            raise StopError

    return progress
