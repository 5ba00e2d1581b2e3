"""How a whole model learns: its loss on windows of text, from a teacher or from the text alone.

Matrix products and activations are in `dtype`. The model is in evaluation mode: dropout would make
two attempts differ.

Legend: W windows, S tokens per window, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from prunus.calibration.training_text import TrainingText
from prunus.distributed import own_part, ranks
from prunus.hardware.numerics import native_bfloat16
from prunus.model.linears import refuse_not_finite
from prunus.recovery.recovery_options import RecoveryOptions
from prunus.recovery.trainable import Trainable, block_linears
from prunus.training.evaluation import perplexity_of
from prunus.training.loop import Learner
from prunus.training.loss import next_token_loss

# A step of more tokens is split into several forward passes, whose gradients add up. The logits
# and activations of a pass are what takes the memory of a step.
_TOKENS_PER_PASS = 2048


def products_dtype(requested: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of products and activations, and the reason, for the record.

    `requested` is "float32", "bfloat16", or "auto", which is bfloat16 where that is native.
    """
    if requested != "auto":
        return (torch.float32 if requested == "float32" else torch.bfloat16), "requested"
    place = "device" if device.type == "cuda" else "processor"
    if device.type == "cuda" or native_bfloat16():
        return torch.bfloat16, f"native on this {place}; trained parameters stay float32"
    return torch.float32, "this processor has no native bfloat16"


@dataclass
class ModelLearner(Learner):
    """A model in memory that learns from text; see `Learner`.

    The `parameters`, their `device` and `autocast` are made from these.
    """

    #: What is trained.
    trainable: Trainable
    #: The windows to train on, and the held-out windows.
    text: TrainingText
    #: How it is trained.
    options: RecoveryOptions
    #: The dtype of matrix products and activations.
    dtype: torch.dtype
    #: The dense model in memory; None to learn from the text alone.
    teacher: Any

    def __post_init__(self) -> None:
        self.parameters = self.trainable.parameters
        self.device = next(iter(self.parameters.values())).device
        is_float32 = self.dtype == torch.float32
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=not is_float32)

    def add_gradients(self, step: int) -> float:
        """See `Learner`. Each part's loss is weighted by its windows: sums over parts are means."""
        ids = self.text.windows(step * self.options.batch, self.options.batch)
        total = 0.0
        at_a_time = max(1, _TOKENS_PER_PASS // self.options.seqlen)
        for part in own_part(ids).split(at_a_time):
            loss = self._loss(part, self.teacher) * (len(part) / len(ids))
            loss.backward()
            total += float(loss.detach())
        for name, mask in self.trainable.masks.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                # On a CPU this takes a quarter of the time of masked_fill_, or less.
                gradient.mul_(mask)
        return total

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean next-token cross entropy of the held-out windows, in nats per token.

        All ranks call it, each for its part of the windows, and all get the mean over all windows.
        """
        windows = own_part(self.text.held_out)
        # One window at a time: its sum does not depend on how many windows a rank has.
        losses = [float(self._loss(ids, teacher=None)) for ids in windows.split(1) if len(ids)]
        gathered = ranks().all_gather(torch.tensor(losses, dtype=torch.float64)).tolist()
        return sum(gathered) / len(gathered)

    def refuse_not_finite(self, loss: float) -> None:
        """The error names the first linear whose inputs are not finite."""
        refuse_not_finite(
            block_linears(self.trainable.model),
            self.held_out_loss,
            f"the held-out loss is {loss} before any training: outputs",
        )

    def words(self, loss: float) -> str:
        """The perplexity."""
        return f"held-out perplexity {perplexity_of(loss):.3f}"

    def _loss(self, ids_WS: torch.Tensor, teacher: Any) -> torch.Tensor:
        """Mean loss of windows; without a teacher it is the plain cross entropy with the text."""
        ids_WS = ids_WS.to(self.device)
        teacher_WSV = None
        if teacher is not None:
            with torch.no_grad():
                teacher_WSV = teacher(input_ids=ids_WS, use_cache=False).logits
        with self.autocast:
            logits_WSV = self.trainable.model(input_ids=ids_WS, use_cache=False).logits
        return next_token_loss(logits_WSV, ids_WS, teacher_WSV, self.options.distill_weight)
