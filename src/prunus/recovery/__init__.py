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
student.py      the model in training and its teacher, in memory
checkpoints.py  the state of a training on disk
result.py       the tensors of the pruned checkpoint, some of them replaced
record.py       what was done, for programs
card.py         what was done, for readers
"""
