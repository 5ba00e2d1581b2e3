"""How good a model is: perplexity, tasks; and how much models differ.

eval_options     what to measure; each option is declared once
eval_records     results as records, and the differences between models
model_input      the model to evaluate: found, checked and watched
perplexity       perplexity of a model on a text, and the text in windows
metrics          how a model differs from a reference: each metric is one entry
window_scores    the loop over windows: loss, and divergence from a reference
streamed_model   logits of a model that does not fit in memory, block by block
task_scores      models on tasks of lm-eval; the only file that imports it
inspection       zeros and patterns of the linears in a checkpoint, and its size
generation       text that a model writes
check            `compress --check`
tasks/           lm-eval's tasks for rows of a local folder
"""
