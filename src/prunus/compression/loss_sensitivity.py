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
from dataclasses import dataclass

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
    ids: Tensor,
    selected: Sequence[Sequence[str]],
    options: MethodOptions,
    seed: int,
) -> dict[str, LinearSensitivity]:
    """Full name -> sensitivity of the linears of the dense model that are `selected` per block.

    The stream has embedded `ids` (windows, tokens) as one batch.
    """
    inputs, found = _block_inputs(stream), dict[str, LinearSensitivity]()
    gradient, scale = _gradient_of_loss(stream, ids, seed), _gradient_scale(stream)
    for index in reversed(range(len(stream.skeleton))):
        gradient, of_block = _measure_block(stream, index, inputs.pop(), gradient, selected[index])
        for name, sums in of_block.items():
            found[name] = sums.sensitivity(options, scale * scale * ids.numel())
            if not bool(found[name].loss_O.isfinite().all()):
                raise ValueError(f"the gradients of {name} are not finite; try `dtype` float32")
        stream.skeleton.release(index)
    return found


def part_width(linears: Sequence[Linear]) -> int:
    """The width of the parts in which the inputs of a block's linears are measured.

    Gram matrices grow with the square of it. The more linears, the narrower are the parts.
    """
    inputs = sum(linear.shape[1] for linear in linears)
    return max(1, min(_MAX_WIDTH, _MAX_BYTES // (4 * max(1, inputs))))


def _rounded_products(stream: Stream) -> torch.autocast:
    """Let products be rounded to bfloat16 where that is faster than the model's float32."""
    # The result is a mean over random draws, so the rounding costs nothing.
    fast = multiplies_bfloat16(stream.device) and stream.skeleton.dtype == torch.float32
    return torch.autocast(stream.device.type, torch.bfloat16, enabled=fast)


def _gradient_scale(stream: Stream) -> float:
    """The factor of all gradients, which keeps those in float16 from becoming 0."""
    return _FLOAT16_SCALE if stream.skeleton.dtype == torch.float16 else 1.0


def _block_inputs(stream: Stream) -> list[Tensor]:
    """The inputs of every block; the stream ends after the last block."""
    inputs = []
    for index in range(len(stream.skeleton)):
        inputs.append(stream.states.get(0).cpu())
        with _rounded_products(stream):
            stream.propagate(index, stream.source.block(index))
    return inputs


def _gradient_of_loss(stream: Stream, ids: Tensor, seed: int) -> Tensor:
    """The gradient of Σ log p(y) at the outputs of the last block."""
    skeleton, rows = stream.skeleton, []
    generator = torch.Generator().manual_seed(seed)
    with skeleton.outside_blocks(stream.source.read_outside, stream.device, with_head=True):
        # Window by window: logits are large.
        for window_ids, hidden in zip(ids.split(1), stream.states.get(0).split(1), strict=True):
            hidden = hidden.detach().requires_grad_()
            with torch.enable_grad(), _rounded_products(stream):
                logits = skeleton.logits(window_ids.to(hidden.device), hidden)
                log_p = logits.flatten(0, -2).float().log_softmax(dim=-1)
                probabilities = log_p.detach().exp().cpu()
                drawn = torch.multinomial(probabilities, 1, generator=generator)
                log_p_drawn = log_p.gather(1, drawn.to(log_p.device))
                (_gradient_scale(stream) * log_p_drawn.sum()).backward()
            assert hidden.grad is not None
            rows.append(hidden.grad)
    return torch.cat(rows)


class _Sums:
    """Sums over all tokens of one linear: of inputs, and of squared gradients of outputs."""

    def __init__(self, linear: Linear, width: int, device: torch.device) -> None:
        inputs = linear.shape[1]
        self._linear = linear
        self._statistics = InputStatistics(inputs, "norms", device)
        self._parts = [
            InputStatistics(min(width, inputs - start), "gram", device)
            for start in range(0, inputs, width)
        ]
        self._squares_O: Tensor | None = None

    def add(self, x_TI: Tensor, output_TO: Tensor) -> None:
        """Add up the inputs of a linear, and its squared gradients once they are known."""
        if not len(x_TI):
            return
        self._statistics.add(x_TI)
        for part, x_TP in zip(
            self._parts, x_TI.split(self._parts[0].in_features, dim=1), strict=True
        ):
            part.add(x_TP)
        if output_TO.requires_grad:
            output_TO.register_hook(self._add_gradient)

    def _add_gradient(self, gradient: Tensor) -> None:
        squares_O = tokens_of(gradient.detach()).float().square().sum(dim=0)
        self._squares_O = squares_O if self._squares_O is None else self._squares_O + squares_O

    def sensitivity(self, options: MethodOptions, unit: float) -> LinearSensitivity:
        """What is known of the linear; `unit` is the number of tokens in units of the gradients."""
        weight_OI, statistics = self._linear.weight_OI.float(), self._statistics
        rows, columns = weight_OI.shape
        # Of an expert that no token chose nothing is known: it counts as little as the least.
        loss_O = torch.full((rows,), 1e-12, device=weight_OI.device)
        power, steps_I = 1.0, torch.ones(columns, device=weight_OI.device)
        if statistics.tokens > 0 and self._squares_O is not None:
            mean_O = self._squares_O / unit
            loss_O = (mean_O + _SHARED * mean_O.mean()).clamp_min_(1e-12)
            squares_I = statistics.sum_squares_I.float()
            power = max(float(squares_I.mean()) / statistics.tokens, 1e-12)
            steps_I = torch.cat([_part_steps(part, squares_I, options) for part in self._parts])
        known = LinearSensitivity(loss_O, power, torch.zeros(0))
        scaled_OI = weight_OI / known.scales_O[:, None]
        deviation_I = scaled_OI.square().mean(dim=0).sqrt() / steps_I
        places_Q = (torch.arange(_QUANTILES, device=deviation_I.device) + 0.5) / _QUANTILES
        return LinearSensitivity(loss_O.cpu(), power, deviation_I.quantile(places_Q).cpu())


def _measure_block(
    stream: Stream, index: int, inputs: Tensor, gradient: Tensor, names: Sequence[str]
) -> tuple[Tensor, dict[str, _Sums]]:
    """The gradient at the inputs of a block, and the sums of its linears by full name."""
    skeleton, device = stream.skeleton, stream.device
    block = skeleton.fill(index, stream.source.block(index), device)
    linears = [linear for linear in skeleton.linears(index) if linear.name in names]
    width = part_width(linears)
    sums = {linear.name: _Sums(linear, width, device) for linear in linears}
    run, hidden = stream.call(index, block), inputs.to(device).requires_grad_()
    with (
        output_hooks(
            linears, lambda linear, x, output: sums[linear.name].add(tokens_of(x.detach()), output)
        ),
        torch.enable_grad(),
        _rounded_products(stream),
    ):
        run(hidden).backward(gradient.to(device))
    assert hidden.grad is not None
    name = skeleton.block_name(index)
    return hidden.grad, {f"{name}.{linear}": each for linear, each in sums.items()}


def _part_steps(part: InputStatistics, squares_I: Tensor, options: MethodOptions) -> Tensor:
    """U_jj of some inputs, as if the others did not exist, in the unit of all inputs."""
    # `relative_steps` divides by the mean diagonal of its own Gram matrix.
    own = float(part.sum_squares_I.float().mean())
    steps_I = relative_steps(part, options.damping)
    return steps_I * (float(squares_I.mean()) / own) ** 0.5 if own > 0 else torch.ones_like(steps_I)
