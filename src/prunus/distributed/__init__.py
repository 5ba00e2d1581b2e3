"""Several processes on one run: torchrun starts them, torch.distributed carries their messages.

base.py       `ranks()`, the processes that work together now, and what they do together
group.py      `Ranks` over a process group of torch (gloo, NCCL) that torchrun's environment names

Code that uses them needs no branch for the single process. This room knows tensors, numbers and
texts; it knows nothing of models, windows or files.
"""

from prunus.distributed.base import (
    SINGLE_PROCESS,
    OtherRankError,
    RankError,
    Ranks,
    fail_together,
    on_rank_0,
    own_part,
    ranks,
    set_location,
    split_range,
    sum_floats,
    sum_ints,
    tensors_from_rank_0,
    using,
)
from prunus.distributed.group import DEFAULT_TIMEOUT, is_rank_0, process_group

__all__ = [
    "DEFAULT_TIMEOUT",
    "SINGLE_PROCESS",
    "OtherRankError",
    "RankError",
    "Ranks",
    "fail_together",
    "is_rank_0",
    "on_rank_0",
    "own_part",
    "process_group",
    "ranks",
    "set_location",
    "split_range",
    "sum_floats",
    "sum_ints",
    "tensors_from_rank_0",
    "using",
]
