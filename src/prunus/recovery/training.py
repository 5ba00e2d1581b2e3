"""The training loop: windows in, steps of AdamW under a schedule, held-out scores, checkpoints, early stop.

Knows a model that gives logits and the parameters to train; not which mode they come from, nor where they go.
Weights, gradients and moments are float32; matrix products and activations are what `dtype` says. The model is
in evaluation mode, so that no dropout makes two attempts differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from prunus.calibration.stream import TrainingText
from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.pruning.compute_dtype import native_bfloat16
from prunus.pruning.reconstruction.learning_rate import learning_rate
from prunus.recovery.checkpoints import Checkpoints, TrainingState
from prunus.recovery.loss import next_token_loss
from prunus.recovery.options import RecoveryOptions
from prunus.recovery.record import Evaluation
from prunus.recovery.trainable import Trainable

__all__ = ["Step", "steps_of", "train", "training_dtype"]

# Tokens of one forward pass; a step of more is made of several, whose gradients add up.
_TOKENS_PER_PASS = 2048
_MAX_NORM = 1.0  # gradients are scaled down to this, as is usual for language models


@dataclass(frozen=True)
class Step:
    """One step, for whoever shows it. `perplexity` is the held-out one, where it was just measured."""

    share: float
    tokens: int
    seconds: float
    message: str
    loss: float | None = None
    perplexity: float | None = None


def training_dtype(requested: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of matrix products and activations, and why: bfloat16 wherever it is native, for its speed."""
    if requested != "auto":
        return (torch.float32 if requested == "float32" else torch.bfloat16), "asked for"
    if device.type == "cuda":
        return torch.bfloat16, "native on this device; what is trained stays float32"
    if native_bfloat16():
        return torch.bfloat16, "native on this processor; what is trained stays float32"
    return torch.float32, "this processor has no native bfloat16"


def steps_of(options: RecoveryOptions) -> int | None:
    """Steps that a budget in tokens is worth, the last one whole; None for a budget in minutes."""
    tokens = options.budget_tokens
    return None if tokens is None else math.ceil(tokens / (options.batch * options.seqlen))


class _Trainer:
    def __init__(
        self,
        trainable: Trainable,
        text: TrainingText,
        options: RecoveryOptions,
        dtype: torch.dtype,
        teacher: Any,
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.trainable = trainable
        self.text = text
        self.options = options
        self.teacher = teacher
        self.parameters = list(trainable.parameters.values())
        self.device = self.parameters[0].device
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, weight_decay=options.weight_decay, fused=True
        )

    def share(self, state: TrainingState, seconds: float, ahead: float = 0.0) -> float:
        """Share of the budget that is spent when `seconds` have passed, `ahead` steps from now."""
        steps = steps_of(self.options)
        if steps is not None:
            return (state.step + ahead) / steps
        assert self.options.minutes is not None
        return seconds / (60 * self.options.minutes)

    def loss(self, ids: torch.Tensor, judge: bool = False) -> torch.Tensor:
        """Mean loss of windows (W, S); to `judge` by it is the plain cross entropy with the text."""
        ids = ids.to(self.device)
        guide = None
        if self.teacher is not None and not judge:
            with torch.no_grad():
                guide = self.teacher(input_ids=ids, use_cache=False).logits
        with self.autocast:
            logits = self.trainable.model(input_ids=ids, use_cache=False).logits
        return next_token_loss(logits, ids, guide, self.options.distill_weight)

    def step(self, state: TrainingState, share: float) -> float:
        """One step of the optimiser; returns its loss. Where that is not finite, nothing is changed.

        Each rank takes some of the step's windows; gradients are added up, and all ranks take the same step.
        """
        ids = self.text.windows(state.step * self.options.batch, self.options.batch)
        total, mine = 0.0, self.ranks.own_range(len(ids))
        for part in ids[mine.start : mine.stop].split(
            max(1, _TOKENS_PER_PASS // self.options.seqlen)
        ):
            loss = self.loss(part) * (len(part) / len(ids))
            loss.backward()
            total += float(loss.detach())
        self._add_up()
        total = self.ranks.sum_floats([total])[0]
        for name, support in self.trainable.supports.items():
            gradient = self.trainable.parameters[name].grad
            if gradient is not None:
                gradient.mul_(support)  # in a quarter of the time that masked_fill_ takes, or less
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, _MAX_NORM)
        if math.isfinite(total) and bool(norm.isfinite()):
            rate = learning_rate(
                self.options.peak_rate(self.trainable.size), share, self.options.warmup
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        else:
            total = math.nan
        self.optimizer.zero_grad()
        return total

    def _add_up(self) -> None:
        """Replace gradients by their sums over ranks; none stands for zeros."""
        if self.ranks.size == 1:
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.ranks.all_reduce(parameter.grad)

    @torch.no_grad()
    def judge(self) -> float:
        """Mean next-token cross entropy of the held-out windows, in nats per token."""
        mine = self.ranks.own_range(len(self.text.held_out))
        own = self.text.held_out[mine.start : mine.stop]
        losses = [float(self.loss(ids, judge=True)) for ids in own.split(1) if len(ids)]
        everybodys = self.ranks.all_gather(torch.tensor(losses, dtype=torch.float64)).tolist()
        return sum(everybodys) / len(everybodys)


def train(
    trainable: Trainable,
    text: TrainingText,
    options: RecoveryOptions,
    dtype: torch.dtype,
    teacher: Any,
    checkpoints: Checkpoints,
    progress: Callable[[Step], None] | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> TrainingState:
    """Train until the budget is spent or nothing is gained any more; go on from a checkpoint where there is one.

    Args:
        trainable: model and parameters; they end as the best on the held-out windows.
        text: windows to train on and held-out ones.
        options: budget, schedule and so on.
        dtype: of matrix products and activations, see `training_dtype`.
        teacher: a causal LM whose logits are learnt, or None.
        checkpoints: where the state is kept.
        progress: called after every step and every evaluation.
        ranks: processes that train the same parameters together, on windows of their own.

    Returns:
        The state at the end. Where the loss was not finite it says `diverged`, and the parameters are the best
        until then.

    Raises:
        ValueError: the loss is not finite before any training.
    """
    trainer = _Trainer(trainable, text, options, dtype, teacher, ranks)
    state = checkpoints.load(trainable.parameters, trainer.optimizer) or TrainingState()
    begun, before, losses = time.perf_counter(), state.seconds, list[float]()

    def seconds() -> float:
        return before + time.perf_counter() - begun

    def show(message: str, loss: float | None = None, perplexity: float | None = None) -> None:
        if progress is not None:
            share = min(1.0, trainer.share(state, seconds()))
            progress(Step(share, state.tokens, seconds(), message, loss, perplexity))

    def evaluate() -> None:
        held_out = trainer.judge()
        if not math.isfinite(held_out):
            if not state.evaluations:
                raise ValueError(
                    f"the held-out loss is {held_out} before any training: the model's outputs are not finite. "
                    "Damaged weights, or a dtype too small for this model; try --dtype float32"
                )
            state.stopped, state.diverged = (
                f"the held-out loss became {held_out} at step {state.step}",
                True,
            )
            return
        entry = Evaluation(
            step=state.step,
            tokens=state.tokens,
            seconds=round(seconds(), 2),
            training_loss=sum(losses) / len(losses) if losses else None,
            held_out_loss=held_out,
        )
        losses.clear()
        state.evaluations.append(entry)
        if held_out < state.evaluations[state.best].held_out_loss:
            state.best = len(state.evaluations) - 1
        elif len(state.evaluations) - 1 - state.best >= options.patience:
            state.stopped = f"no better held-out loss in {options.patience} evaluations"
        state.seconds = seconds()
        checkpoints.save(state, trainable.parameters, trainer.optimizer)
        show(f"held-out perplexity {entry.perplexity:.3f}", entry.training_loss, entry.perplexity)

    if not state.evaluations:
        evaluate()
    elif state.stopped is None:
        show(f"goes on from step {state.step}")
    while state.stopped is None and trainer.share(state, seconds()) < 1:
        loss = trainer.step(state, trainer.share(state, seconds(), ahead=0.5))
        if not math.isfinite(loss):
            state.stopped, state.diverged = (
                f"the loss was not finite at step {state.step + 1}",
                True,
            )
            break
        losses.append(loss)
        state.step += 1
        state.tokens += options.batch * options.seqlen
        show(f"loss {loss:.3f}", loss)
        share = trainer.share(state, seconds())
        if share >= min(1.0, len(state.evaluations) / options.evaluations):
            evaluate()
    state.seconds = seconds()
    ranks.gather_ints([0])  # the first rank has written them
    checkpoints.load_best(state, trainable.parameters)
    ranks.gather_ints([0])  # and may delete them once all have read
    return state
