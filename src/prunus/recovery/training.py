"""The training loop: windows in, steps of AdamW, held-out evaluations, checkpoints.

The loop knows a model that gives logits, and the parameters to train. It does not know which mode
they come from or where they go. Weights, gradients and moments are float32; matrix products and
activations are in `dtype`. The model is in evaluation mode: dropout would make two attempts differ.

Legend: W windows, S tokens per window, R rows at a time, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunus.calibration.training_text import TrainingText
from prunus.distributed import own_part, ranks, sum_floats
from prunus.engine.reconstruction.train import learning_rate
from prunus.hardware.numerics import native_bfloat16
from prunus.methods.divergence import kl_sum, log_probabilities
from prunus.model.linears import refuse_not_finite
from prunus.recovery.checkpoints import Checkpoints, TrainingState
from prunus.recovery.recovery_options import RecoveryOptions
from prunus.recovery.recovery_record import Evaluation
from prunus.recovery.trainable import Trainable, block_linears

# A step of more tokens is split into several forward passes, whose gradients add up. The logits
# and activations of a pass are what takes the memory of a step.
_TOKENS_PER_PASS = 2048

# Gradients are scaled down to this norm, as is usual for language models.
_MAX_NORM = 1.0
# Rows of logits that are in float32 at a time. On a CPU they should stay in the cache.
_ROWS = 64
# The same on a CUDA device, where few large kernels are faster than many small ones.
_CUDA_ROWS = 4096


@dataclass(frozen=True)
class Step:
    """How far a training is, after a step or an evaluation."""

    #: Share of the budget that is spent, from 0 to 1.
    fraction: float
    #: Tokens trained on so far.
    tokens: int
    #: Seconds of training and evaluations so far, over all attempts.
    seconds: float
    #: What has just happened, for people.
    message: str
    #: The loss of the step, or the mean of the steps since the last evaluation; None if there is
    #: none.
    loss: float | None = None
    #: The perplexity of the held-out windows if they have just been evaluated; else None.
    perplexity: float | None = None


def training_dtype(requested: str, device: torch.device) -> tuple[torch.dtype, str]:
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
class Training:
    """One training, which `run` carries out.

    Other attributes are made from these: the trained `parameters` and their `device`, `autocast`,
    the `optimizer`, and the `losses` of the steps since the last evaluation.
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
    #: Where the state of the training is kept.
    checkpoints: Checkpoints
    #: Called after every step and every evaluation.
    report: Callable[[Step], None]

    def __post_init__(self) -> None:
        self.parameters = list(self.trainable.parameters.values())
        self.device = self.parameters[0].device
        is_float32 = self.dtype == torch.float32
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=not is_float32)
        # Each step sets its own rate. `fused` updates a parameter in one pass over memory.
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, weight_decay=self.options.weight_decay, fused=True
        )
        # Losses of the steps since the last evaluation.
        self.losses: list[float] = []

    def run(self) -> TrainingState:
        """Train until the budget is spent, or a loss that is not finite ends it.

        It continues from the checkpoint if there is one. At the end the parameters are those with
        the lowest held-out loss.

        Raises:
            ValueError: The checkpoint is damaged, or the model gives outputs that are not finite
                before any training.
        """
        parameters = self.trainable.parameters
        state = self.state = self.checkpoints.load(parameters, self.optimizer) or TrainingState()
        self.began = time.perf_counter() - state.seconds
        if not state.evaluations:
            self._evaluate()
        elif state.stopped is None:
            self._tell(f"resumed at step {state.step}")
        while state.stopped is None and self._spent() < 1:
            # The rate is that of the middle of the step.
            loss = self._step(self._spent(ahead=0.5))
            if not math.isfinite(loss):
                state.stopped = f"the loss was not finite at step {state.step + 1}"
                break
            self.losses.append(loss)
            state.step += 1
            state.tokens += self.options.batch * self.options.seqlen
            self._tell(f"loss {loss:.3f}", loss)
            # Evaluation 0 was before training; evaluation k is due after k parts of the budget.
            if self._spent() >= min(1.0, len(state.evaluations) / self.options.evaluations):
                self._evaluate()
        state.seconds = self._seconds()
        ranks().gather_ints([0])  # Wait until rank 0 has written the best weights,
        self.checkpoints.load_best(state, parameters)
        ranks().gather_ints([0])  # and let rank 0 delete them only when all have read them.
        return state

    def _seconds(self) -> float:
        """Seconds of training and evaluations so far, over all attempts."""
        return time.perf_counter() - self.began

    def _spent(self, ahead: float = 0.0) -> float:
        """Fraction of the budget that is spent, `ahead` steps from now."""
        options = self.options
        if options.budget_tokens is not None:
            # The last step may exceed the budget.
            steps = math.ceil(options.budget_tokens / (options.batch * options.seqlen))
            return (self.state.step + ahead) / steps
        assert options.minutes is not None
        return self._seconds() / (60 * options.minutes)

    def _tell(
        self, message: str, loss: float | None = None, perplexity: float | None = None
    ) -> None:
        """Report how far the training is."""
        spent = min(1.0, self._spent())
        self.report(Step(spent, self.state.tokens, self._seconds(), message, loss, perplexity))

    def _evaluate(self) -> None:
        """Evaluate the held-out windows, and write a checkpoint."""
        state = self.state
        held_out_loss = self.held_out_loss()
        if not math.isfinite(held_out_loss):
            if not state.evaluations:
                refuse_not_finite(
                    block_linears(self.trainable.model),
                    self.held_out_loss,
                    f"the held-out loss is {held_out_loss} before any training: outputs",
                )
            state.stopped = f"the held-out loss became {held_out_loss} at step {state.step}"
            return
        entry = Evaluation(
            step=state.step,
            tokens=state.tokens,
            seconds=round(self._seconds(), 2),
            training_loss=sum(self.losses) / len(self.losses) if self.losses else None,
            held_out_loss=held_out_loss,
        )
        self.losses.clear()
        state.evaluations.append(entry)
        if held_out_loss < state.evaluations[state.best].held_out_loss:
            state.best = len(state.evaluations) - 1
        state.seconds = self._seconds()
        self.checkpoints.save(state, self.trainable.parameters, self.optimizer)
        words = f"held-out perplexity {entry.perplexity:.3f}"
        self._tell(words, entry.training_loss, entry.perplexity)

    def _step(self, spent: float) -> float:
        """Take one step of the optimizer and return its loss. `spent` is the share of the budget.

        If the loss is not finite, nothing changes. Each rank computes the gradients of some of the
        step's windows; their sum makes all ranks take the same step.
        """
        ids = self.text.windows(self.state.step * self.options.batch, self.options.batch)
        total = 0.0
        at_a_time = max(1, _TOKENS_PER_PASS // self.options.seqlen)
        for part in own_part(ids).split(at_a_time):
            loss = self._loss(part, self.teacher) * (len(part) / len(ids))
            loss.backward()
            total += float(loss.detach())
        # Each part's loss was weighted by its windows, so sums over parts and ranks are means. A
        # missing gradient counts as zeros, such as that of an expert that no token chose. So every
        # parameter has moments, and checkpoints need not say which have none.
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            ranks().all_reduce(parameter.grad)
        total = sum_floats([total])[0]
        for name, mask in self.trainable.masks.items():
            gradient = self.trainable.parameters[name].grad
            if gradient is not None:
                # On a CPU this takes a quarter of the time of masked_fill_, or less.
                gradient.mul_(mask)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, _MAX_NORM)
        # A single bad step would spoil weights and moments for good, so it is not taken.
        if math.isfinite(total) and bool(norm.isfinite()):
            peak = self.options.peak_rate(self.trainable.weight_rms)
            (group,) = self.optimizer.param_groups
            group["lr"] = learning_rate(peak, spent, self.options.warmup)
            self.optimizer.step()
        else:
            total = math.nan
        self.optimizer.zero_grad()
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


# --- the loss ---

# With p the teacher's and q the model's distribution of the next token, y the token that follows,
# and w the weight of the teacher (Hinton et al., arXiv 1503.02531, at temperature 1):
#
#     w · Σ_v p_v (log p_v − log q_v)  −  (1 − w) · log q_y
#
# Loss and gradient, (q − w·p − (1−w)·[v = y]) / tokens, are computed together in float32, a few
# rows at a time. The usual way, whole matrices of log-probabilities that wait for the backward
# pass, takes more memory than a small model and more time to move than to compute. For the same
# reason the logits are not cut and copied. The last position of a window predicts nothing; it gets
# a gradient of zeros.


def next_token_loss(
    logits_WSV: Tensor, ids_WS: Tensor, teacher_WSV: Tensor | None = None, weight: float = 1.0
) -> Tensor:
    """The mean loss of predicting tokens 2..S of every window, a float32 scalar.

    Args:
        logits_WSV: The model's logits, in any floating dtype. The loss is differentiable in them,
            and their gradient has the same dtype.
        ids_WS: Token ids, int64.
        teacher_WSV: The teacher's logits on the same windows; None for cross entropy alone.
        weight: The weight of the KL divergence, from 0 to 1. Without a teacher it counts as 0.

    Equal logits for four tokens are a cross entropy of log 4.

    >>> logits, ids = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])
    >>> round(float(next_token_loss(logits, ids)), 4)
    1.3863
    >>> float(next_token_loss(logits, ids, teacher_WSV=logits))
    0.0
    """
    targets_WS = ids_WS[:, 1:].to(logits_WSV.device)
    loss: Tensor = _Loss.apply(
        logits_WSV, targets_WS, teacher_WSV, weight if teacher_WSV is not None else 0.0
    )
    return loss


class _Loss(torch.autograd.Function):
    """The formula above, with its gradient in the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits_WSV: Tensor, targets_WS: Tensor, teacher_WSV: Tensor | None, weight: float
    ) -> Tensor:
        rows = _ROWS if logits_WSV.device.type == "cpu" else _CUDA_ROWS
        windows, predicted = targets_WS.shape
        gradient_WSV = torch.empty_like(logits_WSV) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=logits_WSV.device)
        for window in range(windows):
            for first in range(0, predicted, rows):
                part = window, slice(first, min(first + rows, predicted))
                logq_RV = log_probabilities(logits_WSV[part])
                targets_R1 = targets_WS[part][:, None]
                if weight < 1:
                    total -= (1 - weight) * logq_RV.gather(1, targets_R1).sum(dtype=torch.float64)
                p_RV = None
                if teacher_WSV is not None:
                    logp_RV = log_probabilities(teacher_WSV[part])
                    p_RV = logp_RV.exp()
                    total += weight * kl_sum(p_RV, logp_RV.sub_(logq_RV), by_term=True)
                if gradient_WSV is not None:
                    # q − w·p − (1−w)·[v = y], in place of log q.
                    change_RV = logq_RV.exp_()
                    if p_RV is not None:
                        change_RV.sub_(p_RV, alpha=weight)
                    if weight < 1:
                        ones_R1 = torch.ones_like(targets_R1, dtype=torch.float32)
                        change_RV.scatter_add_(1, targets_R1, (weight - 1) * ones_R1)
                    gradient_WSV[part] = change_RV.div_(windows * predicted)
            if gradient_WSV is not None:
                gradient_WSV[window, predicted] = 0
        if gradient_WSV is not None:
            ctx.save_for_backward(gradient_WSV)
        return (total / (windows * predicted)).float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_WSV,) = ctx.saved_tensors
        # Usually a step has one part and the factor is 1; then a pass over all logits is saved.
        if float(outer[0]) != 1:
            gradient_WSV = gradient_WSV * outer[0].to(gradient_WSV.dtype)
        return gradient_WSV, None, None, None
