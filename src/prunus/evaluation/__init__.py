"""How good a model is: perplexity, accuracy on tasks and images, speed, and whether models differ.

perplexity.py     texts in windows, scored; window_scores.py has the loop and the divergence
streamed_model.py a model that does not fit in memory, read block by block
reference.py      the model to compare with, whose blocks run once for each text
task_runner.py    models on tasks of lm-eval, which only tasks.py imports, and on images
speed.py          memory and decoding speed
inspection.py     zeros and N:M patterns in a checkpoint, and its size
generation.py     text that a model writes
model_input.py    the model that is given: folder, hub id, adapter or loaded model
records.py        results and differences as records, without torch
"""
