"""The step "train": a short training wins back quality of a smaller model.

recovery_options   what a training does; each option is declared once
recovery_plan      all checks before any work
trainable          what a mode trains, and which weights are pruned
student            the models in memory, and mode lora
training           the loop of steps, evaluations and checkpoints, and the loss
checkpoints        the state of a training on disk
recover            one recovery, and the folder of its result
recovery_record    the file `prunus-recovery.json` beside the result
"""
