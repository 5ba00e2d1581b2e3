"""The training loop: steps of AdamW, held-out evaluations, checkpoints.

The loop does not know what is trained. A `Learner` has the parameters, and computes losses and
gradients: `recovery/learner.py` of a whole model, `compression/tuning.py` of a rounded one.
Parameters, gradients and moments are float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from prunus.distributed import ranks, sum_floats
from prunus.engine.reconstruction.train import learning_rate
from prunus.training.checkpoints import Checkpoints, TrainingState
from prunus.training.evaluation import Evaluation

# Gradients are scaled down to this norm, as is usual for language models.
_MAX_NORM = 1.0


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


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a training is, and how fast.

    Attributes:
        tokens: The budget in tokens; None if it is in minutes.
        minutes: The budget in minutes; None if it is in tokens.
        step_tokens: The tokens of a step.
        rate: The peak learning rate; see `learning_rate` for its course.
        by_loss: Whether the rate is in units of the held-out loss before the training.
        warmup: The fraction of the budget over which the rate rises.
        evaluations: How often the held-out windows are evaluated, beside the start.
        weight_decay: Of AdamW.
        betas: The decay rates of AdamW's moments.
    """

    tokens: int | None
    minutes: float | None = None
    step_tokens: int
    rate: float
    by_loss: bool = False
    warmup: float = 0.05
    evaluations: int = 8
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)


class Learner(Protocol):
    """What is trained, and how its losses and gradients are computed.

    Attributes:
        parameters: What is trained, float32, by names that are also those in a checkpoint.
    """

    parameters: Mapping[str, nn.Parameter]

    def add_gradients(self, step: int) -> float:
        """Add the gradients of this rank's part of a step, and return its part of the loss.

        Weights that must not change get gradients of 0.

        Args:
            step: The number of the step, from 0, which decides its windows.
        """

    def held_out_loss(self) -> float:
        """The loss on the held-out windows; all ranks call it, and get the same."""

    def refuse_not_finite(self, loss: float) -> None:
        """Raise a ValueError that says where a loss before any training is not finite."""

    def words(self, loss: float) -> str:
        """A held-out loss for people."""


@dataclass
class Training:
    """One training, which `run` carries out.

    The `optimizer`, and the `losses` of the steps since the last evaluation, are made from these.
    """

    #: What is trained.
    learner: Learner
    #: How long, and how fast.
    schedule: Schedule
    #: Where the state of the training is kept.
    checkpoints: Checkpoints
    #: Called after every step and every evaluation.
    report: Callable[[Step], None]

    def __post_init__(self) -> None:
        self.parameters = list(self.learner.parameters.values())
        # Each step sets its own rate. `fused` updates a parameter in one pass over memory.
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=0.0,
            betas=self.schedule.betas,
            weight_decay=self.schedule.weight_decay,
            fused=True,
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
        parameters = self.learner.parameters
        state = self.state = (
            self.checkpoints.load_state(parameters, self.optimizer) or TrainingState()
        )
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
            state.tokens += self.schedule.step_tokens
            self._tell(f"loss {loss:.3f}", loss)
            # Evaluation 0 was before training; evaluation k is due after k parts of the budget.
            if self._spent() >= min(1.0, len(state.evaluations) / self.schedule.evaluations):
                self._evaluate()
        state.seconds = self._seconds()
        ranks().gather_ints([0])  # Wait until rank 0 has written the best weights,
        self.checkpoints.load_best(state, parameters)
        ranks().gather_ints([0])  # and let rank 0 delete them only when all have read them.
        return state

    @property
    def peak_rate(self) -> float:
        """The peak learning rate, once the held-out windows were evaluated."""
        before = self.state.evaluations[0].held_out_loss if self.schedule.by_loss else 1.0
        return self.schedule.rate * before

    def _seconds(self) -> float:
        """Seconds of training and evaluations so far, over all attempts."""
        return time.perf_counter() - self.began

    def _spent(self, ahead: float = 0.0) -> float:
        """Fraction of the budget that is spent, `ahead` steps from now."""
        schedule = self.schedule
        if schedule.tokens is not None:
            # The last step may exceed the budget.
            return (self.state.step + ahead) / math.ceil(schedule.tokens / schedule.step_tokens)
        assert schedule.minutes is not None
        return self._seconds() / (60 * schedule.minutes)

    def _tell(
        self, message: str, loss: float | None = None, perplexity: float | None = None
    ) -> None:
        """Report how far the training is."""
        spent = min(1.0, self._spent())
        self.report(Step(spent, self.state.tokens, self._seconds(), message, loss, perplexity))

    def _evaluate(self) -> None:
        """Evaluate the held-out windows, and write a checkpoint."""
        state = self.state
        held_out_loss = self.learner.held_out_loss()
        if not math.isfinite(held_out_loss):
            if not state.evaluations:
                self.learner.refuse_not_finite(held_out_loss)
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
        self.checkpoints.save(state, self.learner.parameters, self.optimizer)
        words = self.learner.words(held_out_loss)
        self._tell(words, entry.training_loss, entry.perplexity)

    def _step(self, spent: float) -> float:
        """Take one step of the optimizer and return its loss. `spent` is the share of the budget.

        If the loss is not finite, nothing changes. Each rank computes the gradients of some of the
        step's windows; their sum makes all ranks take the same step.
        """
        total = self.learner.add_gradients(self.state.step)
        # A missing gradient counts as zeros, such as that of an expert that no token chose. So
        # every parameter has moments, and checkpoints need not say which have none.
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            ranks().all_reduce(parameter.grad)
        total = sum_floats([total])[0]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, _MAX_NORM)
        # A single bad step would spoil weights and moments for good, so it is not taken.
        if math.isfinite(total) and bool(norm.isfinite()):
            (group,) = self.optimizer.param_groups
            group["lr"] = learning_rate(self.peak_rate, spent, self.schedule.warmup)
            self.optimizer.step()
        else:
            total = math.nan
        self.optimizer.zero_grad()
        return total
