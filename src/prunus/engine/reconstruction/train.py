"""Train the surviving weights of one block until its outputs come close to given targets.

    minimise over the kept W    Σ_t ‖block(x̂_t; W) − y_t‖² / ‖y_t‖²

x̂ are the block's inputs in the pruned model, and y the outputs of the dense block in the dense
model. The mask stays as it is, and no gradient leaves the block. So only this block's weights,
gradients and moments are in memory. Wanda++ (arXiv 2503.04992) and EBFT (arXiv 2402.12419) train
pruned blocks in this spirit; the target here is the output of the whole block.

The result is the candidate with the lowest error on validation batches: the weights before
training, a snapshot that was taken during training, or a point interpolated between start and end.
A training that does harm is therefore never taken over.

Outline: `train_block` prepares the block and restores it; `_train` chooses among the candidates;
`_run_epochs` takes the steps; `_interpolations` adds candidates between start and end.

This file knows a module, functions that give outputs and targets, and masks. It knows nothing about
checkpoints, folders or text.

Legend: 2, as a suffix, stands for the pair (summed loss, what to divide it by).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prunus.distributed import ranks, sum_ints
from prunus.engine.reconstruction.cached_suffix import ALL_TOKENS
from prunus.engine.reconstruction.output_loss import OutputLoss, relative_error

# Adam's second moments are estimates from few gradients at first, so the rate rises slowly, over
# this fraction of the steps.
_WARMUP = 0.05

# Decay rates of Adam's moments. A block takes some ten to a few hundred steps: in so few, the usual
# (0.9, 0.999) average over too many of them. With these, five epochs leave the error that seven
# leave with the usual ones (docs/notes/recovery.md, "Shorter averages in Adam").
_BETAS = 0.5, 0.9

# Validate four times per training, and at least once every four epochs.
_VALIDATIONS, _MAX_EPOCHS_BETWEEN = 4, 4


@dataclass(frozen=True)
class BlockBatches:
    """The batches that a block learns from, by number.

    Attributes:
        forward: (batch, tokens) -> the block's output (windows, tokens, hidden) on these tokens of
            the batch. Training calls it under autograd.
        target: Batch -> what the output should be, for all tokens, in any floating dtype.
        train: Numbers of the batches to train on.
        validation: Numbers of the batches that choose between the candidates.
    """

    forward: Callable[[int, slice], torch.Tensor]
    target: Callable[[int], torch.Tensor]
    train: Sequence[int]
    validation: Sequence[int]


@dataclass(frozen=True)
class TrainOptions:
    """How a block is trained.

    Attributes:
        epochs: Passes over the training batches.
        token_stride: A step runs the trained part of the block on one token in this many. The next
            epoch uses the next ones.
        learning_rate: Peak rate of Adam as a fraction of the root mean square (RMS) of each
            parameter's surviving weights, as in Adafactor (arXiv 1804.04235, section 8). A step of
            Adam moves every weight by about the rate, whatever the gradient's size. Models differ
            tenfold in the size of their weights, so a plain rate that suits one model destroys
            another. For its course see the function `learning_rate`.
        logit_stride: With the loss on logits, one in this many of the tokens of a step is compared.
        dtype: Dtype of matrix products and activations, float32 or bfloat16. A block in this dtype
            computes in it throughout; any other computes in float32 with its products cast.
    """

    epochs: int = 3
    token_stride: int = 1
    learning_rate: float = 3e-3
    logit_stride: int = 1
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class TrainResult:
    """The outcome of training a block.

    Attributes:
        weights: The best candidate: the trained parameters by relative name, float32, zero outside
            their masks.
        error_before: Loss on the validation batches, of the weights before training.
        error_after: Loss on the validation batches, of the best candidate; at most `error_before`.
        steps: Gradient steps taken.
        stopped: Why training ended early, for people; None if it did not.
        step_seconds: What a step of the last epoch took, on average.
        validation_seconds: What the last validation took.
    """

    weights: dict[str, torch.Tensor]
    error_before: float
    error_after: float
    steps: int
    stopped: str | None = None
    step_seconds: float = 0.0
    validation_seconds: float = 0.0


def train_block(
    block: nn.Module,
    batches: BlockBatches,
    masks: Mapping[str, torch.Tensor],
    options: TrainOptions,
    loss: OutputLoss = relative_error,
) -> TrainResult:
    """Train the surviving weights of `block`; its own parameters end as they began.

    Several ranks split the windows of every batch: `batches` gives each rank its own windows, which
    may be none, and gradients are summed.

    Args:
        block: The block with its weights in place, on the device where it runs.
        batches: What it learns from.
        masks: Relative name of a parameter -> bool of its shape, True for weights that survive.
            Only these parameters are trained.
        options: How it is trained.
        loss: Compares an output with its target.

    Raises:
        ValueError: There is nothing to train, or there are no batches; or outputs or targets are
            not finite before any training.

    >>> block = nn.Linear(2, 1, bias=False).requires_grad_(False)
    >>> _ = block.weight.copy_(torch.tensor([[1.0, 0.0]]))
    >>> x = torch.tensor([[[1.0, 0.0], [2.0, 1.0]]])
    >>> target = 3 * x[..., :1]
    >>> batches = BlockBatches(lambda batch, tokens: block(x), lambda batch: target, [0], [0])
    >>> options = TrainOptions(learning_rate=0.1, epochs=200)
    >>> result = train_block(block, batches, {"weight": block.weight != 0}, options)
    >>> [round(value, 2) for value in result.weights["weight"].flatten().tolist()]
    [3.0, 0.0]
    """
    if not masks or not batches.train or not batches.validation:
        raise ValueError(
            f"block reconstruction got {len(masks)} weights, {len(batches.train)} training batches "
            f"and {len(batches.validation)} validation batches; it needs at least one of each"
        )
    # A block in bfloat16 computes as the run does, in bfloat16. Any other one computes in float32,
    # so that only its matrix products are cast.
    native = all(p.dtype == options.dtype for p in block.parameters() if p.is_floating_point())
    with (
        contextlib.nullcontext() if native else in_float32(block),
        trainable(block, masks) as weights,
    ):
        return _train(weights, batches, options, loss)


class _Objective:
    """The loss of the block's current parameters on batches.

    Attributes:
        device: Where the block runs.
        step_seconds: What a step of the last epoch took, on average.
        validation_seconds: What the last call of `validate` took.
    """

    def __init__(
        self, weights: TrainedWeights, batches: BlockBatches, dtype: torch.dtype, loss: OutputLoss
    ) -> None:
        first = next(iter(weights.parameters.values()))
        self.device = first.device
        # It casts matrix products if the parameters are not in the dtype of the training.
        self._autocast = torch.autocast(first.device.type, dtype, enabled=dtype != first.dtype)
        self.step_seconds = self.validation_seconds = 0.0
        self._batches = batches
        self._loss = loss

    def sums(self, batch: int, tokens: slice = ALL_TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss of this rank's windows, and what to divide it by; both 0 without windows."""
        with self._autocast:
            output = self._batches.forward(batch, tokens)
        # Targets are not trained: a block that computes them does so in the run's own dtype.
        with torch.no_grad():
            target = self._batches.target(batch)
        if not len(output):
            return torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        with self._autocast:
            return self._loss(output, target[:, tokens])

    def validate(self) -> float:
        """Loss on all validation batches of all ranks."""
        started = time.perf_counter()
        with torch.no_grad():
            # Validation always runs all tokens, so that its errors are comparable.
            pairs = [torch.stack(self.sums(batch)) for batch in self._batches.validation]
        # Sums are divided only once, after all batches and ranks: a batch counts by its tokens.
        total_2 = sum(pairs, torch.zeros(2, device=self.device))
        ranks().all_reduce(total_2)
        error = float(total_2[0]) / float(total_2[1])
        self.validation_seconds = time.perf_counter() - started
        return error


@dataclass
class _Best:
    """The best candidate so far."""

    weights: dict[str, torch.Tensor]  #: float32, by relative name
    error: float  #: on the validation batches

    def offer(self, error: float, weights: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Take a candidate over if it is better. `weights` makes the copy only then."""
        if error < self.error:  # False for NaN
            self.weights, self.error = weights(), error


def _train(
    weights: TrainedWeights,
    batches: BlockBatches,
    options: TrainOptions,
    loss: OutputLoss,
) -> TrainResult:
    """Train parameters that are prepared already; see `train_block`."""
    objective = _Objective(weights, batches, options.dtype, loss)
    before = objective.validate()
    if not math.isfinite(before):
        raise ValueError(
            "the block's outputs or their targets are not finite; check the checkpoints' weights"
        )
    # The weights before training are the first candidate.
    best = _Best(weights.snapshot(), before)
    # Adam's moments are freed when this function returns; the interpolations below need memory.
    after, steps, stopped = _run_epochs(weights, objective, batches.train, options, best)
    # Without a step, start and end are the same weights.
    if not steps:
        return TrainResult(best.weights, before, best.error, steps, stopped)
    end = weights.snapshot()

    def error_at(fraction: float) -> float:
        weights.assign(weights.interpolate(end, fraction))
        return objective.validate()

    for fraction, error in _interpolations(before, after, error_at):
        best.offer(error, lambda fraction=fraction: weights.interpolate(end, fraction))  # type: ignore[misc]
    times = objective.step_seconds, objective.validation_seconds
    return TrainResult(best.weights, before, best.error, steps, stopped, *times)


def _run_epochs(
    weights: TrainedWeights,
    objective: _Objective,
    train: Sequence[int],
    options: TrainOptions,
    best: _Best,
) -> tuple[float, int, str | None]:
    """Run Adam over all epochs, and offer snapshots to `best`.

    Args:
        weights: The trained parameters. They end as the last step leaves them.
        objective: The loss to minimise.
        train: Numbers of the training batches, in the order of the steps of an epoch.
        options: How the block is trained.
        best: The best candidate so far, which is replaced by a better snapshot.

    Returns:
        The last validation error, the steps taken, and why training ended early, or None.
    """
    masters = weights.masters
    scales = kept_rms(masters, weights.masks)
    groups = [{"params": [master], "scale": scales[name]} for name, master in masters.items()]
    # `fused` updates a parameter in one pass over memory.
    optimizer = torch.optim.Adam(groups, betas=_BETAS, fused=True)
    steps = 0
    total = options.epochs * len(train)
    stride = options.token_stride
    interval = _epochs_between(options.epochs)
    error = best.error
    stopped = None
    for epoch in range(options.epochs):
        started = time.perf_counter()
        for batch in train:
            # The rate is that of the middle of the step.
            rate = learning_rate(options.learning_rate, (steps + 0.5) / total, _WARMUP)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            # The first token moves by one per epoch, so that `stride` epochs use every token once.
            # Different batches start at different tokens.
            tokens = slice((epoch + batch) % stride, None, stride)
            with torch.enable_grad():
                summed, size = objective.sums(batch, tokens)
                whole_2 = torch.stack([summed.detach(), size])
                # Dividing by the size over all ranks makes the summed gradients those of one
                # process.
                ranks().all_reduce(whole_2)
                loss = summed / whole_2[1]
            # All ranks see the same sums, so all stop at the same step.
            if not bool((whole_2[0] / whole_2[1]).isfinite()):
                stopped = "the error is not finite any more; a smaller learning rate may help"
                break
            if loss.requires_grad:  # False on a rank that has no windows of this batch
                loss.backward()
            for name, gradient in weights.take_gradients().items():
                masters[name].grad = gradient
            optimizer.step()
            optimizer.zero_grad()
            # The next forward pass uses the new masters, rounded if the block is in bfloat16.
            weights.assign(masters)
            steps += 1
        objective.step_seconds = (time.perf_counter() - started) / len(train)
        if stopped is not None or (epoch + 1) % interval == 0 or epoch + 1 == options.epochs:
            error = objective.validate()
            best.offer(error, weights.snapshot)
        if stopped is not None:
            break
    return error, steps, stopped


def _epochs_between(epochs: int) -> int:
    """Epochs from one validation to the next."""
    return max(1, min(epochs // _VALIDATIONS, _MAX_EPOCHS_BETWEEN))


def validations(epochs: int) -> int:
    """How often a training validates: before it, between epochs, and twice between its ends.

    >>> validations(2), validations(5), validations(14)
    (5, 8, 8)
    """
    return 3 + math.ceil(epochs / _epochs_between(epochs))


def _interpolations(
    before: float, after: float, error_at: Callable[[float], float]
) -> Iterator[tuple[float, float]]:
    """Yield fractions of the way from start to end weights, and their validation errors.

    These are the middle, and the lowest point of the parabola through start, middle and end. It is
    rounded to eighths, so that ranks whose errors differ by rounding choose the same point.

    Why: part of what few tokens teach is noise. Half of the way keeps half of the gain but only a
    quarter of the noise's error, which grows with the square of the way. So a rate that is too high
    for a block costs little, and two evaluations replace a search for the rate of each block.

    Args:
        before: Validation error of the weights before training.
        after: Validation error of the weights after the last step.
        error_at: Validation error at a fraction of the way; all ranks evaluate it at once.
    """
    # With f(0) = before, f(1/2) = middle and f(1) = after, the parabola's second derivative is
    # twice `curvature`, and its lowest point is at (3 before − 4 middle + after) / (2 curvature).
    middle = error_at(0.5)
    yield 0.5, middle
    curvature = 2 * (before - 2 * middle + after)
    if curvature > 0:  # False if any error is NaN
        fraction = (3 * before - 4 * middle + after) / (2 * curvature)
        if 0 < fraction < 1 and (fraction := round(8 * fraction) / 8) not in (0, 0.5, 1):
            yield fraction, error_at(fraction)


def learning_rate(peak: float, fraction: float, warmup: float = 0.0) -> float:
    """The learning rate when `fraction` of the training is done.

    It rises in a line to the peak and then falls along half a cosine to 0. The shape is that of
    Loshchilov and Hutter (arXiv 1608.03983, equation 5) without restarts.

    Args:
        peak: The highest rate, which is reached at the end of the warm-up.
        fraction: How much of the budget is spent, from 0 to 1; larger values count as 1. The unit
            of the budget does not matter: steps, tokens or seconds.
        warmup: Fraction of the training over which the rate rises from 0, below 1.

    >>> [round(learning_rate(2.0, f, warmup=0.1), 6) for f in (0.0, 0.05, 0.1, 0.55, 1.0)]
    [0.0, 1.0, 2.0, 1.0, 0.0]
    """
    if fraction < warmup:
        return peak * fraction / warmup
    decayed = (min(fraction, 1.0) - warmup) / (1.0 - warmup)
    return peak * (0.5 + 0.5 * math.cos(math.pi * decayed))


# --- the weights of a block while it is trained: parameters, float32 masters, masks, gradients ---


class TrainedWeights:
    """The trained parameters of a block, and the float32 masters that Adam updates.

    A float32 parameter is its own master. In bfloat16, a parameter is its master rounded. The
    masters are needed there because most steps are smaller than the spacing of bfloat16 numbers:
    added to a bfloat16 weight they would be rounded away, in the master they add up.

    Args:
        parameters: The trained parameters of the block, by relative name; float32 or bfloat16. They
            begin to require gradients. `trainable` undoes that.
        masks: Bool of each parameter's shape, True for weights that survive.

    Attributes:
        parameters: As given.
        masks: As given.
        start: A copy of the parameters' values from before the training, in their dtypes.
        masters: Float32 leaf tensors that Adam updates, by relative name.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]
    ) -> None:
        self.parameters = parameters
        self.masks = masks
        # The masks as numbers 0 and 1. On a CPU a product takes a quarter of the time if both
        # factors have the same dtype.
        self._factors = {name: masks[name].to(p.dtype) for name, p in parameters.items()}
        # Where the training began: the block gets these values back at the end, and interpolations
        # start from them.
        self.start = {name: p.detach().clone() for name, p in parameters.items()}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self.masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in parameters.items()
        }

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Copies of the masters, float32."""
        return {name: master.detach().clone() for name, master in self.masters.items()}

    def interpolate(
        self, end: Mapping[str, torch.Tensor], fraction: float
    ) -> dict[str, torch.Tensor]:
        """start + fraction · (end − start), float32, where `end` has values by relative name."""
        return {name: self.start[name].float().lerp(last, fraction) for name, last in end.items()}

    @torch.no_grad()
    def assign(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put values, by relative name, into the block's parameters, rounded to their dtypes."""
        for name, parameter in self.parameters.items():
            if values[name] is not parameter:
                parameter.copy_(values[name])

    def take_gradients(self) -> dict[str, torch.Tensor]:
        """Take the gradients from the parameters, sum them over ranks, and mask them.

        All ranks call it at once.

        Returns:
            Relative name -> gradient, float32. A parameter that has no gradient on any rank is left
            out, such as an expert that no token reached.
        """
        # On how many ranks each parameter has a gradient.
        present = sum_ints([p.grad is not None for p in self.parameters.values()])
        anywhere = dict(zip(self.parameters, present, strict=True))
        gradients = {}
        for name, parameter in self.parameters.items():
            if anywhere[name]:
                if parameter.grad is not None:
                    # A pruned weight gets a zero gradient, so Adam's update of it is exactly zero.
                    # On a CPU, the product takes a tenth of the time of masked_fill.
                    gradients[name] = parameter.grad.mul_(self._factors[name]).float()
                else:
                    # Another rank has the gradient, so this one joins the sum with zeros.
                    gradients[name] = torch.zeros_like(parameter, dtype=torch.float32)
                ranks().all_reduce(gradients[name])
            parameter.grad = None
        return gradients


@contextlib.contextmanager
def trainable(block: nn.Module, masks: Mapping[str, torch.Tensor]) -> Iterator[TrainedWeights]:
    """Yield the parameters of `block` that `masks` names, ready to be trained.

    At the end they have the values of the beginning, and require no gradients.
    """
    parameters = {name: block.get_parameter(name) for name in masks}
    weights = TrainedWeights(parameters, masks)
    try:
        yield weights
    finally:
        for name, parameter in parameters.items():
            # The caller stores the result itself; its block must not change under it.
            parameter.requires_grad_(False).copy_(weights.start[name])
            parameter.grad = None


@contextlib.contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """While active, all floating-point parameters of the block are float32.

    Afterwards they are rounded to the dtypes that they had.
    """
    before = {
        parameter: parameter.dtype
        for parameter in block.parameters()
        if parameter.is_floating_point()
    }
    for parameter in before:
        # Assigning `data` keeps the parameter object, which other code refers to.
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before.items():
            parameter.data = parameter.data.to(dtype)


def kept_rms(
    weights: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """The root mean square of the weights of each parameter that its mask lets survive.

    A bias takes that of the weight of its linear: biases are often zero at the start, and a rate
    relative to zero would never move them.

    >>> weights = {"up.weight": torch.tensor([3.0, 5.0, 9.0]), "up.bias": torch.zeros(1)}
    >>> masks = {"up.weight": torch.tensor([True, True, False]), "up.bias": torch.tensor([True])}
    >>> {name: round(rms, 3) for name, rms in kept_rms(weights, masks).items()}
    {'up.weight': 4.123, 'up.bias': 4.123}
    """
    rms_by_name = {
        name: float((weight.detach() * masks[name]).norm() / masks[name].sum().clamp_min(1).sqrt())
        for name, weight in weights.items()
    }
    return {
        name: rms_by_name.get(f"{name.removesuffix('.bias')}.weight", rms)
        for name, rms in rms_by_name.items()
    }
