"""What a training records of its held-out windows. Imports no torch."""

from __future__ import annotations

import math

from prunus.engine.run_record import RecordPart


class Evaluation(RecordPart):
    """One evaluation of the held-out windows."""

    #: Steps of the optimizer before it.
    step: int
    #: Tokens trained on before it.
    tokens: int
    #: Seconds of training and evaluations before it, over all attempts.
    seconds: float
    #: Mean training loss since the previous evaluation; None at the start.
    training_loss: float | None
    #: Mean next-token cross entropy in nats per token. It is the cross entropy with the text even
    #: if the training minimises something else.
    held_out_loss: float

    @property
    def perplexity(self) -> float:
        """See `perplexity_of`."""
        return perplexity_of(self.held_out_loss)


def perplexity_of(loss: float) -> float:
    """exp of a loss in nats per token; infinite if that overflows a float.

    >>> perplexity_of(0.0)
    1.0
    """
    return math.exp(loss) if loss < 700 else math.inf
