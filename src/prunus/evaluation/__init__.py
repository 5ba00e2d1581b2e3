"""How good a model is: perplexity, accuracy on tasks and images, and whether two models differ.

Scoring text:
perplexity.py       the verb
text.py             texts, cut into windows that do not overlap
window_scores.py    the loop over windows: loss, KL divergence, same most likely token
logits.py           where logits of windows come from, and a model in memory
streamed_model.py   a model that does not fit in memory, read block by block
reference.py        the model to compare with, whose blocks run once for each text

Tasks of lm-eval:
task_runner.py      the verb `evaluate`: models on tasks, checked and scored
tasks.py            the only file that imports lm-eval
local_tasks.py      rows of tasks from local files
lm_eval_results.py  results of lm-eval as our own scores
task_scores.py      scores with standard errors
comparison.py       differences between models, paired row by row

Both:
model_input.py      the model that is given: folder, hub id, adapter or loaded model
watched.py          a checkpoint that must not change while it is scored
records.py          results as records, without torch

images.py           top-1 accuracy of image classifiers
size.py, speed.py   size of files, memory and decoding speed
generation.py       text that a model writes
inspection.py       sparsity and N:M patterns in a checkpoint
"""
