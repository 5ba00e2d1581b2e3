"""Recovery: train a pruned or compressed model for a short time to win quality back.

options.py      what to do: validated and frozen
job.py          everything that is checked and decided before any work
run.py          the story of one recovery
max_preset.py   preset max: prune, then recover
training.py     the loop: schedule, held-out evaluations, checkpoints, early stop
loss.py         cross entropy and distillation, a few rows of logits at a time
trainable.py    what a mode trains; mode masked: everything but the pruned weights
lora.py         mode lora: LoRA layers through peft
scales.py       mode scales: scales, steps, norms and biases of a compressed model
masks.py        which weights are pruned, and the check that they still are
teacher.py      whether the dense model can teach the pruned one
checkpoints.py  the state of a training on disk
output.py       the folder of the result
compressed_result.py  the folder of a compressed result
record.py       what was done, for programs
card.py         what was done, for readers
"""

from prunus.recovery.max_preset import prune_and_recover
from prunus.recovery.options import MODES, RecoveryOptions
from prunus.recovery.record import RecoveryRecord
from prunus.recovery.run import recover
from prunus.recovery.training import Step

__all__ = ["MODES", "RecoveryOptions", "RecoveryRecord", "Step", "prune_and_recover", "recover"]
