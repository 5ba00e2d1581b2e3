"""What a model is worth: perplexity."""

from prunus.evaluation.perplexity import (
    PerplexityResult,
    ScoringText,
    load_scoring_text,
    perplexity,
    score_windows,
)

__all__ = ["PerplexityResult", "ScoringText", "load_scoring_text", "perplexity", "score_windows"]
