"""How good a model is: perplexity, accuracy on tasks and images, and whether two models differ.

text.py                 scoring texts, cut into windows that do not overlap
perplexity.py           perplexity of a model on a text
perplexity_result.py    the result as a record
divergence.py           how far a model's predictions are from those of a reference
reference.py            the reference, whose blocks run once for each text
whole_model.py          logits of windows from a model in memory
streamed_perplexity.py  the same for a model that does not fit in memory: block by block
loss.py                 the loss of one window
tasks.py                tasks of lm-eval, with rows from the hub or from local_datasets.py
task_runner.py          models on tasks: checked, looked up in the cache, scored
lm_eval_results.py      results of lm-eval as our own scores
task_scores.py          scores with standard errors
comparison.py           differences between models, paired row by row
images.py               top-1 accuracy of image classifiers
cache.py                results of earlier calls, found by what determines them
model_input.py          the model that is given: folder, hub id, adapter or loaded model
speed.py                decoding speed, file size and memory
generation.py           text that a model writes
inspection.py           sparsity and N:M patterns in a checkpoint
"""

from prunus.evaluation.cache import default_cache_folder
from prunus.evaluation.comparison import Difference, compare, side_by_side
from prunus.evaluation.divergence import Divergence
from prunus.evaluation.images import ImageScore, image_accuracy
from prunus.evaluation.model_input import check_same_vocabulary, find_folder
from prunus.evaluation.perplexity import (
    ScoringText,
    load_scoring_text,
    perplexity,
    score_windows,
)
from prunus.evaluation.perplexity_result import PerplexityResult
from prunus.evaluation.reference import Reference
from prunus.evaluation.task_runner import TaskRun, evaluate, prepare_tasks
from prunus.evaluation.task_scores import PAPER7, Metric, TaskResults, TaskScore
from prunus.evaluation.text import PROTOCOLS, check_text

__all__ = [
    "PAPER7",
    "PROTOCOLS",
    "Difference",
    "Divergence",
    "ImageScore",
    "Metric",
    "PerplexityResult",
    "Reference",
    "ScoringText",
    "TaskResults",
    "TaskRun",
    "TaskScore",
    "check_same_vocabulary",
    "check_text",
    "compare",
    "default_cache_folder",
    "evaluate",
    "find_folder",
    "image_accuracy",
    "load_scoring_text",
    "perplexity",
    "prepare_tasks",
    "score_windows",
    "side_by_side",
]
