"""Several processes on one run: torchrun starts them, torch.distributed carries their messages.

base.py       `Ranks`, what a run needs from its processes, for a run with one process
group.py      `Ranks` over a process group of torch (gloo, NCCL) that torchrun's environment names

Code that uses `Ranks` needs no branch for the single process. This room knows tensors, numbers and
texts; it knows nothing of models, windows or files.
"""

from prunus.distributed.base import (
    SINGLE_PROCESS,
    OtherRankError,
    RankError,
    Ranks,
    own_part,
    split_range,
)
from prunus.distributed.group import DEFAULT_TIMEOUT, is_rank_0, process_group

__all__ = [
    "DEFAULT_TIMEOUT",
    "SINGLE_PROCESS",
    "OtherRankError",
    "RankError",
    "Ranks",
    "is_rank_0",
    "own_part",
    "process_group",
    "split_range",
]
