"""How the loss of the dense model grows with errors in the outputs of its linears.

If the outputs z of a linear change by small errors e that do not depend on the text, the expected
loss grows by half of

    Σ_i s_i · E[e_i²],    s_i = E[(∂ log p(y) / ∂z_i)²],    y drawn from the model's own p.

This is the diagonal of the Fisher information (Amari 1998), measured at the outputs. So s says how
many bits each linear, and each of its rows, repays.

Two passes measure it with one block in memory at a time. The first keeps the inputs of every block
for a few windows. The second runs through the blocks from the last to the first: each one runs
again, and the gradient runs back through it.

Shape suffixes: O outputs, I inputs, Q quantiles of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunus.hardware.numerics import multiplies_bfloat16
from prunus.methods.options import MethodOptions
from prunus.methods.rate_distortion import relative_steps
from prunus.methods.statistics import InputStatistics
from prunus.model.linears import Linear
from prunus.model.stream import Stream
from prunus.pruning.block.hooks import output_hooks, tokens_of

#: The windows that measure, and their length.
PROBE_WINDOWS, PROBE_TOKENS = 8, 256
# This share of its linear's mean is added to the sensitivity of every row. A few tokens say little
# about a single row, and may miss it.
_SHARED = 0.1
# The largest width of a part of a linear's inputs, and the most bytes of a block's Gram matrices.
_MAX_WIDTH, _MAX_BYTES = 2048, 2**30
# Numbers that stand for the inputs of a linear.
_QUANTILES = 64
# float16 gradients below 6e-8 are 0.
_FLOAT16_SCALE = 2.0**12


@dataclass(frozen=True)
class LinearSensitivity:
    """What is known of a linear before it is quantised.

    Attributes:
        loss_O: s_i, float32 (O,).
        power: the mean square of an input.
        deviations_Q: float32 (Q,): quantiles over the inputs of the deviation of a column's
            weights in units of U_jj, with the rows scaled as they will be quantised.
    """

    loss_O: Tensor
    power: float
    deviations_Q: Tensor

    @property
    def scales_O(self) -> Tensor:
        """The relative steps of the rows, s_i^-½, with a geometric mean of 1."""
        logs_O = self.loss_O.log()
        return (0.5 * (logs_O.mean() - logs_O)).exp()

    @property
    def unit(self) -> float:
        """The step, relative to U_jj, at which an error raises the loss as in every linear."""
        return float((-0.5 * self.loss_O.log().mean()).exp()) * self.power**-0.5


def loss_sensitivities(
    stream: Stream,
    ids: Sequence[Tensor],
    selected: Sequence[Sequence[str]],
    options: MethodOptions,
    seed: int,
) -> dict[str, LinearSensitivity]:
    """Measure all selected linears of the dense model.

    Args:
        ids: token ids (windows, tokens) of every batch.
        selected: per block the relative names of the linears.

    Returns:
        Full name of a linear -> its sensitivity.

    Raises:
        ValueError: the gradients of a linear are not finite; names it.
    """
    inputs = _block_inputs(stream)
    gradients = _gradients_of_loss(stream, ids, seed)
    found: dict[str, LinearSensitivity] = {}
    tokens = sum(batch.numel() for batch in ids)
    for index in reversed(range(len(stream.skeleton))):
        found |= _measure_block(
            stream, index, inputs.pop(), gradients, selected[index], options, tokens
        )
    return found


def part_width(linears: Sequence[Linear]) -> int:
    """The width of the parts in which the inputs of a block's linears are measured.

    A Gram matrix grows with the square of its width, so wide inputs are cut into parts. In a block
    with many linears, such as experts, narrower parts keep all Gram matrices within a bound.
    """
    inputs = sum(linear.shape[1] for linear in linears)
    return max(1, min(_MAX_WIDTH, _MAX_BYTES // (4 * max(1, inputs))))


def _rounded_products(stream: Stream) -> torch.autocast:
    """Let products be rounded to bfloat16 where that is faster than the model's float32.

    The result is a mean over random draws, so the rounding costs nothing.
    """
    fast = multiplies_bfloat16(stream.device) and stream.skeleton.dtype == torch.float32
    return torch.autocast(stream.device.type, torch.bfloat16, enabled=fast)


def _gradient_scale(stream: Stream) -> float:
    """The factor of all gradients, which keeps those in float16 from becoming 0."""
    return _FLOAT16_SCALE if stream.skeleton.dtype == torch.float16 else 1.0


def _block_inputs(stream: Stream) -> list[list[Tensor]]:
    """The inputs of every block, per batch; the stream ends after the last block."""
    skeleton, inputs = stream.skeleton, []
    for index in range(len(skeleton)):
        inputs.append([stream.states.get(batch).cpu() for batch in range(len(stream))])
        with _rounded_products(stream):
            stream.propagate(index, stream.source.block(index))
    return inputs


def _gradients_of_loss(stream: Stream, ids: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Per batch the gradient of Σ log p(y) at the outputs of the last block."""
    skeleton, gradients = stream.skeleton, []
    generator = torch.Generator().manual_seed(seed)
    scale = _gradient_scale(stream)
    with skeleton.outside_blocks(stream.source.read_outside, stream.device, with_head=True):
        for batch, batch_ids in enumerate(ids):
            rows = []
            # Window by window: logits are large.
            for window_ids, hidden in zip(
                batch_ids.split(1), stream.states.get(batch).split(1), strict=True
            ):
                hidden = hidden.detach().requires_grad_()
                with torch.enable_grad(), _rounded_products(stream):
                    logits = skeleton.logits(window_ids.to(hidden.device), hidden)
                    log_p = logits.flatten(0, -2).float().log_softmax(dim=-1)
                    drawn = torch.multinomial(
                        log_p.detach().exp().cpu(), 1, generator=generator
                    ).to(log_p.device)
                    (scale * log_p.gather(1, drawn).sum()).backward()
                assert hidden.grad is not None
                rows.append(hidden.grad)
            gradients.append(torch.cat(rows))
    return gradients


@dataclass
class _Sums:
    """Sums over all tokens of one linear."""

    statistics: InputStatistics
    squares_O: Tensor | None = None
    #: The statistics of each part of the inputs.
    parts: list[InputStatistics] = field(default_factory=list)


def _measure_block(
    stream: Stream,
    index: int,
    inputs: list[Tensor],
    gradients: list[Tensor],
    names: Sequence[str],
    options: MethodOptions,
    tokens: int,
) -> dict[str, LinearSensitivity]:
    """Measure a block, and take the gradients back to its inputs, in place."""
    skeleton, device = stream.skeleton, stream.device
    block = skeleton.fill(index, stream.source.block(index), device)
    linears = [linear for linear in skeleton.linears(index) if linear.name in names]
    width = part_width(linears)
    sums = {linear.name: _new_sums(linear, width, device) for linear in linears}
    run = stream.call(index, block)
    with output_hooks(
        linears, lambda linear, x, output: _add(sums[linear.name], tokens_of(x.detach()), output)
    ):
        for batch, hidden in enumerate(inputs):
            hidden = hidden.to(device).requires_grad_()
            with torch.enable_grad(), _rounded_products(stream):
                run(hidden).backward(gradients[batch].to(device))
            assert hidden.grad is not None
            gradients[batch] = hidden.grad
    scale = _gradient_scale(stream)
    found = {}
    for linear in linears:
        full_name = f"{skeleton.block_name(index)}.{linear.name}"
        found[full_name] = _sensitivity(linear, sums[linear.name], options, tokens, scale)
        if not bool(found[full_name].loss_O.isfinite().all()):
            raise ValueError(f"the gradients of {full_name} are not finite; try `dtype` float32")
    skeleton.release(index)
    return found


def _new_sums(linear: Linear, width: int, device: torch.device) -> _Sums:
    inputs = linear.shape[1]
    starts = range(0, inputs, width)
    parts = [InputStatistics(min(width, inputs - start), "gram", device) for start in starts]
    return _Sums(InputStatistics(inputs, "norms", device), None, parts)


def _add(into: _Sums, x_TI: Tensor, output_TO: Tensor) -> None:
    """Add up the inputs of a linear, and its squared gradients once they are known."""
    if not len(x_TI):
        return
    into.statistics.add(x_TI)
    for part, x_TP in zip(into.parts, x_TI.split(into.parts[0].in_features, dim=1), strict=True):
        part.add(x_TP)

    def add_gradient(gradient: Tensor) -> None:
        squares_O = tokens_of(gradient.detach()).float().square().sum(dim=0)
        into.squares_O = squares_O if into.squares_O is None else into.squares_O + squares_O

    if output_TO.requires_grad:
        output_TO.register_hook(add_gradient)


def _sensitivity(
    linear: Linear, sums: _Sums, options: MethodOptions, tokens: int, scale: float
) -> LinearSensitivity:
    weight_OI, statistics = linear.weight_OI.float(), sums.statistics
    rows, columns = linear.shape
    reached = statistics.tokens > 0 and sums.squares_O is not None
    # Nothing is known of an expert that no token chose: it counts as little as the least of all.
    loss_O = torch.full((rows,), 1e-12, device=weight_OI.device)
    power, steps_I = 1.0, torch.ones(columns, device=weight_OI.device)
    if reached:
        assert sums.squares_O is not None
        mean_O = sums.squares_O / (scale * scale * tokens)
        loss_O = (mean_O + _SHARED * mean_O.mean()).clamp_min_(1e-12)
        squares_I = statistics.sum_squares_I.float()
        power = max(float(squares_I.mean()) / statistics.tokens, 1e-12)
        steps_I = torch.cat([_part_steps(part, squares_I, options) for part in sums.parts])
    known = LinearSensitivity(loss_O, power, torch.zeros(0))
    scaled_OI = weight_OI / known.scales_O[:, None]
    deviation_I = scaled_OI.square().mean(dim=0).sqrt() / steps_I
    places_Q = (torch.arange(_QUANTILES, device=deviation_I.device) + 0.5) / _QUANTILES
    return LinearSensitivity(loss_O.cpu(), power, deviation_I.quantile(places_Q).cpu())


def _part_steps(part: InputStatistics, squares_I: Tensor, options: MethodOptions) -> Tensor:
    """U_jj of some inputs, as if the others did not exist, in the unit of all inputs.

    `relative_steps` divides by the mean diagonal of its own Gram matrix.
    """
    own = float(part.sum_squares_I.float().mean())
    steps_I = relative_steps(part, options.damping)
    return steps_I * (float(squares_I.mean()) / own) ** 0.5 if own > 0 else torch.ones_like(steps_I)
