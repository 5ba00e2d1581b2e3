"""What a model is worth: perplexity, accuracy on tasks, and whether two models differ."""

from prunus.evaluation.cache import default_cache_folder
from prunus.evaluation.comparison import Difference, compare, side_by_side
from prunus.evaluation.images import ImageScore, image_accuracy
from prunus.evaluation.model_input import find_folder
from prunus.evaluation.perplexity import (
    PerplexityResult,
    ScoringText,
    load_scoring_text,
    perplexity,
    score_windows,
)
from prunus.evaluation.task_runner import TaskRun, evaluate, prepare_tasks
from prunus.evaluation.task_scores import PAPER7, Metric, TaskResults, TaskScore
from prunus.evaluation.text import check_text

__all__ = [
    "PAPER7",
    "Difference",
    "ImageScore",
    "Metric",
    "PerplexityResult",
    "ScoringText",
    "TaskResults",
    "TaskRun",
    "TaskScore",
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
