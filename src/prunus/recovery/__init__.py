"""The step "train": a short training wins back quality of a smaller model.

recovery_options   what a training does; each option is declared once
recovery_plan      all checks before any work
trainable          what a mode trains, and which weights are pruned
student            the models in memory, and mode lora
learner            the losses and gradients of a whole model
recover            one recovery, and the folder of its result
recovery_record    the file `prunus-recovery.json` beside the result
"""
