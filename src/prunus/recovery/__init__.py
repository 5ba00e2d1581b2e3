"""Winning quality back after pruning, with the zeros kept.

options.py         what to do: validated, frozen
job.py             everything checked and decided before any work
run.py             the story of one recovery
training.py        the loop: schedule, held-out scores, checkpoints, early stop
loss.py            cross entropy and distillation, a few rows of logits at a time
trainable.py       what a mode trains; masked: everything but what was pruned
lora.py            LoRA through peft
sparse_lora.py     low-rank updates of surviving weights, merged at the end
block_matching.py  block by block towards the dense model's, streaming
supports.py        which weights were pruned, and whether they still are
teacher.py         the dense model, and whether it fits
checkpoints.py     the state of a training on disk
result.py          the folder of the result
record.py, card.py what was done, for machines and for people
"""

from prunus.recovery.options import MODES, RecoveryOptions
from prunus.recovery.record import RecoveryRecord
from prunus.recovery.run import recover
from prunus.recovery.training import Step

__all__ = ["MODES", "RecoveryOptions", "RecoveryRecord", "Step", "recover"]
