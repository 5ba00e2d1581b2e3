"""One run in several processes: torchrun starts them, torch.distributed carries what they tell each other.

base.py     what a run asks of its ranks; `SINGLE_PROCESS` is the one process that has nobody to ask
group.py    the same over a process group of torch (gloo, nccl)
watch.py    who has died, hangs, or met an error
joining.py  from torchrun's environment to one of them

Knows tensors, numbers and texts; nothing of models, windows or files.
"""

from prunus.distributed.base import SINGLE_PROCESS, OtherRankError, RankError, Ranks, split_range
from prunus.distributed.launch import DEFAULT_TIMEOUT, is_rank_0, process_group

__all__ = [
    "DEFAULT_TIMEOUT",
    "SINGLE_PROCESS",
    "OtherRankError",
    "RankError",
    "Ranks",
    "is_rank_0",
    "process_group",
    "split_range",
]
