"""Block matching: the surviving weights of one block are trained until its outputs come close to given ones.

The mask stays as it is, nothing flows through other blocks, and only this block's weights, gradients and moments
are in memory. In the spirit of Wanda++ (arXiv 2503.04992) and EBFT (arXiv 2402.12419), with the whole block's
output as the target:

    minimise over the surviving W   Σ_t ‖block(x̂_t; W) − y_t‖² / Σ_t ‖y_t‖²

x̂ are the block's inputs in the pruned model, y the outputs of the dense block in the dense model. Knows a module,
functions that give inputs and targets, and masks; nothing of checkpoints, folders or text.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.pruning.reconstruction.cached_suffix import ALL_TOKENS
from prunus.pruning.reconstruction.kl_loss import OutputLoss
from prunus.pruning.reconstruction.learning_rate import learning_rate

__all__ = ["TrainOptions", "TrainResult", "train_block"]

_WARMUP = 0.05
# What is held out is looked at after every quarter of the training, but at least after so many passes.
_LOOKS, _MOST_UNSEEN = 4, 4


@dataclass(frozen=True)
class TrainOptions:
    """How a block is trained.

    Attributes:
        learning_rate: Adam's, at its peak; it falls along a cosine.
        relative: the rate counts in units of each parameter's own size, the root mean square of its kept weights (of a
            bias, that of its linear's), as in Adafactor (arXiv 1804.04235, section 8). A step of Adam moves every weight
            by about the rate, and models differ tenfold in how large their weights are.
        passes: over the training batches.
        seconds: stop after that long although passes are left, with the schedule shortened to fit; None: no limit.
        per_token: every token's error counts relative to that token's own target, not to all of them: the few tokens of
            enormous hidden states that most models have would count for all others otherwise.
        dtype: of matrix products and activations (float32 or bfloat16); the weights that are trained and their moments
            are float32. A block that is in that dtype computes in it throughout, any other in float32 with its products
            cast.
        token_stride: a step looks at one token in so many of its batch, every pass at the next ones.
    """

    learning_rate: float = 3e-4
    relative: bool = False
    passes: int = 3
    token_stride: int = 1
    seconds: float | None = None
    dtype: torch.dtype = torch.float32
    per_token: bool = False


@dataclass(frozen=True)
class TrainResult:
    """What came of it.

    Attributes:
        weights: the trained parameters by relative name, float32, zero outside their support; the best on the
            held-out batches of those behind some passes, those on the way to the last, and those that it began with.
        error_before, error_after: Σ‖block(x̂) − y‖² / Σ‖y‖² over the held-out batches, or its mean per token.
        steps: gradient steps that were taken.
        stopped: why training ended early, or None.
    """

    weights: dict[str, torch.Tensor]
    error_before: float
    error_after: float
    steps: int
    stopped: str | None = None


def train_block(
    block: nn.Module,
    forward: Callable[[int, slice], torch.Tensor],
    target: Callable[[int], torch.Tensor],
    train: Sequence[int],
    held_out: Sequence[int],
    supports: Mapping[str, torch.Tensor],
    options: TrainOptions,
    compare: OutputLoss | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> TrainResult:
    """Train the surviving weights of `block` towards the targets. The block's own parameters end as they began.

    Args:
        block: with its weights in place, on the device where it runs.
        forward: batch and some of its tokens -> output (windows, tokens, hidden) of `block` on that batch, of these
            tokens; called under autograd.
        target: batch -> what that output should be of all tokens, any floating dtype.
        train, held_out: numbers of the batches to learn from, and to judge by after every pass or quarter of them.
        supports: relative name of a parameter -> bool of its shape, True where the weight is kept; these
            parameters are trained, all others stay as they are.
        options: see `TrainOptions`.
        compare: what is lost between an output and its target, in place of the squared error.
        ranks: who shares the windows of every batch: `forward` and `target` give this rank's, which may be none, and
            gradients are summed. Not with a limit in seconds, since clocks differ.

    Raises:
        ValueError: nothing to train or no batches; outputs or targets that are not finite before any training.
    """
    if not supports or not train or not held_out:
        raise ValueError(
            "block matching needs pruned linears, batches to train on and batches to judge by"
        )
    native = all(p.dtype == options.dtype for p in block.parameters() if p.is_floating_point())
    with contextlib.nullcontext() if native else _float32(block):
        parameters = {name: block.get_parameter(name) for name in supports}
        begin = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            squares = functools.partial(_squares, per_token=options.per_token)
            return _train(
                parameters,
                begin,
                forward,
                target,
                train,
                held_out,
                supports,
                options,
                compare or squares,
                ranks,
            )
        finally:
            for name, parameter in parameters.items():
                parameter.requires_grad_(False).copy_(begin[name])
                parameter.grad = None


def _train(
    parameters: Mapping[str, nn.Parameter],
    begin: Mapping[str, torch.Tensor],
    forward: Callable[[int, slice], torch.Tensor],
    target: Callable[[int], torch.Tensor],
    train: Sequence[int],
    held_out: Sequence[int],
    supports: Mapping[str, torch.Tensor],
    options: TrainOptions,
    compare: OutputLoss,
    ranks: Ranks,
) -> TrainResult:
    assert ranks.size == 1 or options.seconds is None
    first = next(iter(parameters.values()))
    device = first.device
    autocast = torch.autocast(device.type, options.dtype, enabled=options.dtype != first.dtype)
    # In bfloat16 a parameter is what its float32 weight is rounded to, before every step: small steps add up there.
    weights = {
        name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
        for name, p in parameters.items()
    }
    sizes = _sizes(weights, supports) if options.relative else dict.fromkeys(weights, 1.0)
    groups = [{"params": [weight], "size": sizes[name]} for name, weight in weights.items()]
    optimizer = torch.optim.Adam(groups, fused=True)
    started, steps, total = time.perf_counter(), 0, options.passes * len(train)

    def share() -> float:
        spent = (
            (time.perf_counter() - started) / options.seconds
            if options.seconds is not None
            else 0.0
        )
        return max(spent, (steps + 0.5) / total)

    def measured(batch: int, tokens: slice = ALL_TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
        """What this rank's windows lose, and what that is a share of."""
        output, wanted = forward(batch, tokens), target(batch)[:, tokens]
        if not len(output):
            return torch.zeros((), device=device), torch.zeros((), device=device)
        return compare(output, wanted)

    def judge() -> float:
        with torch.no_grad(), autocast:
            pairs = [torch.stack(measured(batch)) for batch in held_out]
        all_2 = sum(pairs, torch.zeros(2, device=device))
        ranks.all_reduce(all_2)
        return float(all_2[0]) / float(all_2[1])

    before = best = judge()
    if not math.isfinite(before):
        raise ValueError(
            "the block's outputs or their targets are not finite; check the checkpoints' weights"
        )
    best_weights = _copies(weights)
    error, stopped = before, None
    unseen, often = 0, max(1, min(options.passes // _LOOKS, _MOST_UNSEEN))

    def look() -> None:
        nonlocal error, best, best_weights, unseen
        error, unseen = judge(), 0
        if error < best:
            best, best_weights = error, _copies(weights)

    while steps < total and share() < 1 and stopped is None:
        for batch in train:
            if share() >= 1:
                stopped = "out of time"
                break
            rate = learning_rate(options.learning_rate, share(), _WARMUP)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["size"]
            with torch.enable_grad(), autocast:
                turn = steps // len(train) + batch  # batches begin at tokens of their own
                lost, size = measured(
                    batch, slice(turn % options.token_stride, None, options.token_stride)
                )
                whole_2 = torch.stack([lost.detach(), size])
                ranks.all_reduce(whole_2)
                loss = lost / whole_2[1]
            if not bool((whole_2[0] / whole_2[1]).isfinite()):
                stopped = "the error is not finite any more; a smaller learning rate may help"
                break
            if loss.requires_grad:  # not where none of the windows are this rank's
                loss.backward()
            for name, gradient in _gradients(parameters, ranks).items():
                # A tenth of masked_fill's time on a processor.
                weights[name].grad = gradient.mul_(supports[name])
            optimizer.step()
            optimizer.zero_grad()
            _put(weights, parameters)
            steps += 1
        unseen += 1
        if unseen >= often:
            look()
    if unseen:
        look()
    if stopped is None and steps < total:
        stopped = "out of time"  # while the last pass was judged
    if not steps:
        return TrainResult(best_weights, before, best, steps, stopped)
    del optimizer, groups  # the moments' memory is for what comes now
    end = _copies(weights)

    def error_at(share: float) -> float:
        _put(_between(begin, end, share), parameters)
        return judge()

    for share_of_way, found in _on_the_way(before, error, error_at):
        if found < best:
            best, best_weights = found, _between(begin, end, share_of_way)
    return TrainResult(best_weights, before, best, steps, stopped)


def _on_the_way(
    before: float, after: float, error_at: Callable[[float], float]
) -> Iterator[tuple[float, float]]:
    """Shares of the way that training went, and their errors: the middle, and where a parabola through it is least, in
    eighths, which other rounding on other ranks hardly moves.

    Part of what was learnt from few tokens is noise. A shorter way has less of both, and of noise's error, which grows
    as the square, the more so: a rate that is too high for a block costs little then.
    """
    middle = error_at(0.5)
    yield 0.5, middle
    curvature = 2 * (before - 2 * middle + after)
    if curvature > 0:  # not where any of them is NaN
        share = (3 * before - 4 * middle + after) / (2 * curvature)
        if 0 < share < 1 and (share := round(8 * share) / 8) not in (0, 0.5, 1):
            yield share, error_at(share)


def _between(
    begin: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """float32."""
    return {name: begin[name].float().lerp(last, share) for name, last in end.items()}


@torch.no_grad()
def _put(weights: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if weights[name] is not parameter:
            parameter.copy_(weights[name])


def _sizes(
    weights: Mapping[str, torch.Tensor], supports: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """The root mean square of what each parameter keeps; a bias, which may begin at 0, has its linear's."""
    found = {
        name: float(
            (weight.detach() * supports[name]).norm() / supports[name].sum().clamp_min(1).sqrt()
        )
        for name, weight in weights.items()
    }
    return {
        name: found.get(f"{name.removesuffix('.bias')}.weight", size)
        for name, size in found.items()
    }


def _gradients(parameters: Mapping[str, nn.Parameter], ranks: Ranks) -> dict[str, torch.Tensor]:
    """Everybody's gradients added up, float32; none where nobody has one, as of an expert that no token reached."""
    reached = ranks.gather_ints([parameter.grad is not None for parameter in parameters.values()])
    found = {}
    for (name, parameter), somewhere in zip(
        parameters.items(), map(any, zip(*reached, strict=True)), strict=True
    ):
        if somewhere:
            nothing = torch.zeros_like(parameter, dtype=torch.float32)
            found[name] = nothing if parameter.grad is None else parameter.grad.float()
            ranks.all_reduce(found[name])
        parameter.grad = None
    return found


def _squares(
    output: torch.Tensor, target: torch.Tensor, per_token: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """‖output − target‖² and ‖target‖², float32; `per_token` their quotients, summed over tokens, and the tokens."""
    target = target.float()
    error, size = (output.float() - target).square().sum(dim=-1), target.square().sum(dim=-1)
    if per_token:
        known = size > 0
        error, size = error[known] / size[known], known.float()
    return error.sum(), size.sum()


def _copies(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@contextlib.contextmanager
def _float32(block: nn.Module) -> Iterator[None]:
    """While active, the block's parameters are float32: in bfloat16, small steps would be rounded away."""
    before = {
        parameter: parameter.dtype
        for parameter in block.parameters()
        if parameter.is_floating_point()
    }
    for parameter in before:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before.items():
            parameter.data = parameter.data.to(dtype)
