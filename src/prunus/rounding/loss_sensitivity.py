"""How the loss of the dense model grows with errors in the outputs of its linears.

If the outputs z of a linear change by small errors e that do not depend on the text, the expected
loss grows by half of

    Σ_i s_i · E[e_i²],    s_i = E[(∂ log p(y) / ∂z_i)²],    y drawn from the model's own p.

This is the diagonal of the Fisher information (Amari 1998), measured at the outputs. So s says what
errors in a linear, and in each of its rows, cost: which linears should keep more weights or bits.

Errors of weights make larger errors in the outputs of tokens with larger inputs x. Independent
errors of equal size in all weights cost what the sum says if the gradients of each token count by
its inputs (`LossMeasurement.by_inputs`):

    s_i = E[‖x‖² (∂ log p(y) / ∂z_i)²] / E[‖x‖²].

Gemma 3 needs this. A norm follows its `down_proj`, so that a token whose outputs are small has
large gradients. If all tokens count alike, rounding `down_proj` to 4 bits seems to cost fifty times
what it does; see docs/notes/type-choice.md.

Models without logits per token have no p. There s is the mean squared gradient of z·h / ‖h‖, with z
drawn from a normal distribution and h the outputs of the last block: their relative change.

Two passes measure it with one block in memory at a time. The first keeps the inputs of every block
for a few windows. The second runs through the blocks from the last to the first: each one runs
again, and the gradient runs back through it.

Shape suffixes: O outputs, R some of them, I inputs, P sparsities.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prunus.engine.block.hooks import output_hooks, tokens_of
from prunus.engine.block_memory import BlockMemory, activation_bytes
from prunus.engine.run_plan import HashedSource, RunPlan
from prunus.engine.session import Session
from prunus.hardware.numerics import all_finite, multiplies_bfloat16
from prunus.methods.statistics import InputStatistics, statistics_bytes
from prunus.model.kinds import CAUSAL, IMAGES
from prunus.model.linears import Linear
from prunus.model.stream import Stream
from prunus.rounding.group_sweep import relative_steps
from prunus.words import naming

#: The most windows that measure, and the most tokens of each.
PROBE_WINDOWS, PROBE_TOKENS = 8, 256
# This share of its linear's mean is added to the sensitivity of every row. A few tokens say little
# about a single row, and may miss it.
_SHARED = 0.1
# The largest width of a part of a linear's inputs, and the most bytes of a block's Gram matrices.
_MAX_WIDTH, _MAX_BYTES = 2048, 2**30
#: The curve of a linear's loss has a point at every sparsity of 0, 1, 2, ... 39 times this.
CURVE_STEP = 1 / 40
# The rows that the curve is computed from.
_CURVE_ROWS = 256
# The second pass takes about as many times the time of the first.
_BACKWARD = 3
# float16 holds no gradient below 6e-8 and none above 65,504. So gradients are multiplied by the
# first of these factors with which all of them are finite.
_FLOAT16_FACTORS = (2.0**12, 2.0**4, 2.0**-4)


@dataclass(frozen=True)
class LinearSensitivity:
    """How the loss depends on errors of a linear, before it is pruned or rounded.

    U is the upper Cholesky factor of the damped inverse Gram matrix, see `relative_steps`.

    Attributes:
        loss_O: s_i of each row, float32 (O,).
        curve_P: Σ s_i w_ij² E[x_j²] of the weights that Wanda removes at each sparsity, which is
            the loss if their errors were independent, float32 (P,). Empty where the linear is
            rounded.
        importance_I: By how much the squared error of a weight in each column raises that of its
            output, float32 (I,): E[x_j²], or their mean / U_jj² where the linear is rounded and
            later columns correct the error.
    """

    loss_O: Tensor
    curve_P: Tensor = field(default_factory=lambda: torch.zeros(0))
    importance_I: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass(frozen=True)
class LossMeasurement:
    """What to measure of a dense model, and for whom.

    Attributes:
        selected: Per block the relative names of the linears to measure.
        damping: λ of the Gram matrices, see `relative_steps`.
        seed: Seed of the random draws of y or z.
        feedback: Whether the linears will be rounded with feedback, which needs Gram matrices of
            their inputs. Else they are pruned, or each weight is rounded by itself.
        outside: Whether to measure the embedding and the head of a causal model too, each for its
            own part if they are tied.
        by_inputs: Whether the squared gradients of a token count by the squared length of its
            input; see above.
    """

    selected: Sequence[Sequence[str]]
    damping: float | None
    seed: int
    feedback: bool
    outside: bool = False
    by_inputs: bool = False

    def sums(
        self, linears: Sequence[Linear], device: torch.device, factor: float
    ) -> dict[str, _Sums]:
        """Name -> empty sums of linears whose Gram matrices are in memory at the same time."""
        width = part_width(linears) if self.feedback else 0
        return {
            linear.name: _Sums(linear, width, device, factor, self.by_inputs) for linear in linears
        }


def measure_loss(
    plan: RunPlan,
    session: Session,
    ids: Tensor,
    digests: dict[str, str],
    measurement: LossMeasurement,
) -> dict[str, LinearSensitivity]:
    """`loss_sensitivities` of the dense model of a run, on the first of its windows or images.

    Args:
        plan: The run.
        session: Who hears of the steps of the measurement.
        ids: Token ids (windows, tokens), or pixel values (images, channels, height, width).
        digests: Name of a block -> SHA-256 of the weights that a measurement has read. Missing
            hashes are added.
        measurement: What to measure.

    Raises:
        ValueError: A gradient or a weight is not finite; names the linear or the tensor.
        FileExistsError: A block is not the one that an earlier measurement has read.
    """
    windows = ids[:PROBE_WINDOWS]
    windows = windows if windows.is_floating_point() else windows[:, :PROBE_TOKENS]
    stream = Stream(plan.skeleton, HashedSource(plan.source, plan.skeleton, digests), plan.device)
    steps = (1 + _BACKWARD) * len(plan.skeleton)
    count = session.preparing("measuring what errors of each linear cost", steps, plan.device)
    with torch.no_grad(), contextlib.closing(stream):
        stream.embed([windows], None)
        return loss_sensitivities(stream, windows, measurement, count)


def loss_sensitivities(
    stream: Stream,
    ids: Tensor,
    measurement: LossMeasurement,
    count: Callable[[int], None] = lambda steps: None,
) -> dict[str, LinearSensitivity]:
    """Full name -> sensitivity of dense linears.

    Args:
        stream: The dense model, which has embedded `ids` as one batch.
        ids: Token ids (windows, tokens), or pixel values (images, channels, height, width).
        measurement: What to measure.
        count: Called with the steps that are done. Every block has one in the first pass and
            `_BACKWARD` in the second.

    Raises:
        ValueError: The gradients of a linear are not finite; names the linear.
    """
    inputs, sensitivities = _block_inputs(stream, count), dict[str, LinearSensitivity]()
    first, head = inputs[0], None
    if stream.skeleton.kind is CAUSAL:
        gradient, heads = _gradient_of_loss(stream, ids, measurement)
        head = next(iter(heads.values()), None)
    else:
        gradient = _gradient_of_change(stream, measurement.seed)
    unit = gradient.shape[:-1].numel()
    for index in reversed(range(len(stream.skeleton))):
        gradient, of_block = _measure_block(stream, index, inputs.pop(), gradient, measurement)
        for name, sums in of_block.items():
            with naming(name):
                sensitivities[name] = sums.sensitivity(measurement.damping, unit)
            if not bool(sensitivities[name].loss_O.isfinite().all()):
                raise ValueError(f"the gradients of {name} are not finite; try `dtype` float32")
        stream.skeleton.release(index)
        count(_BACKWARD)
    if head is not None:
        sensitivities[head.linear.name] = head.with_feedback(measurement.damping, unit)
        embedding = stream.skeleton.vocabulary_weights.embedding
        sensitivities[embedding.name] = _of_embedding(stream, embedding, ids, first, gradient, unit)
    return sensitivities


def _of_embedding(
    stream: Stream, embedding: Linear, ids: Tensor, first: Tensor, gradient: Tensor, unit: float
) -> LinearSensitivity:
    """The sensitivity of the embedding, from the inputs of the first block and their gradients.

    A row counts by how often its token occurs. A column counts by its squared gradients.
    """
    key = f"{embedding.name}.weight"
    rows_TI = stream.source.read_outside([key])[key][ids.flatten().cpu()].float()
    # Some models multiply rows by a number.
    scale = float(first.float().square().mean() / rows_TI.square().mean().clamp_min(1e-12))
    frequency_O = ids.flatten().cpu().bincount(minlength=embedding.shape[0]) / ids.numel()
    squares_I = tokens_of(gradient).float().square().sum(dim=0).cpu()
    return LinearSensitivity(_shared(frequency_O), importance_I=squares_I * (scale / unit))


def _shared(mean_O: Tensor) -> Tensor:
    """The means of the rows with a share of their own mean; see `_SHARED`. None is 0."""
    return (mean_O + _SHARED * mean_O.mean()).clamp_min_(1e-12)


def measuring_memory(plan: RunPlan, feedback: bool) -> BlockMemory:
    """Memory of the measurement; `hidden` is that of the inputs of all blocks, on the host.

    Args:
        plan: The run.
        feedback: Whether the linears will be rounded, which needs Gram matrices of their inputs.
    """
    skeleton, itemsize = plan.skeleton, plan.dtype.itemsize
    blocks = range(len(skeleton))
    length, hidden = skeleton.window_shape(0, plan.recipe.seqlen)
    if skeleton.kind is not IMAGES:
        length = min(PROBE_TOKENS, length)
    tokens = min(PROBE_WINDOWS, plan.recipe.samples) * length
    linears = [skeleton.linears(index) for index in blocks]
    widest = max(max(linear.shape) for block in linears for linear in block)
    parameters = max(
        sum(p.numel() for p in skeleton.blocks[index].parameters()) for index in blocks
    )
    heads = int(getattr(plan.source.config.get_text_config(), "num_attention_heads", 1) or 1)
    transient = activation_bytes(tokens, length, hidden, widest, heads, itemsize)
    if skeleton.kind is CAUSAL:
        # The head sees one window: its logits, their logarithms, and the gradients of both.
        transient = max(
            transient, skeleton.vocabulary_weights.rows * (hidden * itemsize + 16 * length)
        )
    # A curve sorts some rows of a linear.
    curve = 3 * 4 * _CURVE_ROWS * widest
    return BlockMemory(
        weights=max(map(plan.source.block_nbytes, blocks)) + parameters * itemsize,
        working=max(map(_gram_bytes, linears)) if feedback else curve,
        hidden=len(blocks) * tokens * hidden * itemsize,
        paused=0,
        transient=2 * tokens * hidden * itemsize + transient,
    )


def measuring_bytes(plan: RunPlan, feedback: bool) -> int:
    """The most bytes of the measurement at once; see `measuring_memory`."""
    memory = measuring_memory(plan, feedback)
    return memory.total(hidden=plan.device.type == "cpu", paused=False)


def _gram_bytes(linears: Sequence[Linear]) -> int:
    """Bytes of the Gram matrices of a block's linears, one for each part of their inputs."""
    part = part_width(linears)
    return sum(
        statistics_bytes(min(part, linear.shape[1] - start), "gram")
        for linear in linears
        for start in range(0, linear.shape[1], part)
    )


def part_width(linears: Sequence[Linear]) -> int:
    """The width of the parts in which inputs are measured: Gram matrices grow with its square.

    It is chosen so that the Gram matrices of all linears of a block take at most `_MAX_BYTES`.
    """
    inputs = sum(linear.shape[1] for linear in linears)
    return max(1, min(_MAX_WIDTH, _MAX_BYTES // (4 * max(1, inputs))))


def rounded_products(stream: Stream) -> torch.autocast:
    """Let products be rounded to bfloat16 where that is faster than the model's float32."""
    # The result is a mean over random draws, so the rounding costs nothing.
    fast = rounded_dtype(stream) != stream.skeleton.dtype
    return torch.autocast(stream.device.type, torch.bfloat16, enabled=fast)


def rounded_dtype(stream: Stream) -> torch.dtype:
    """The dtype of the weights in these products."""
    dtype = stream.skeleton.dtype
    fast = multiplies_bfloat16(stream.device) and dtype == torch.float32
    return torch.bfloat16 if fast else dtype


def _in_range(
    stream: Stream, measure: Callable[[float], tuple[Tensor, dict[str, _Sums]]]
) -> tuple[Tensor, dict[str, _Sums]]:
    """`measure(factor)` with the first factor of gradients at which all are finite.

    Returns:
        The gradient at the inputs, in float32 and without the factor, and the sums by name.
    """
    factors = _FLOAT16_FACTORS if stream.skeleton.dtype == torch.float16 else (1.0,)
    for factor in factors:
        gradient, sums = measure(factor)
        if all_finite(gradient) and all(x.is_finite for x in sums.values()):
            break
    return gradient.float() / factor, sums


def _block_inputs(stream: Stream, count: Callable[[int], None]) -> list[Tensor]:
    """The inputs of every block; the stream ends after the last block."""
    inputs = []
    for index in range(len(stream.skeleton)):
        inputs.append(stream.states.get(0).cpu())
        # Read before: what a checkpoint stores may have any dtype, and autocast refuses some.
        weights = stream.source.block(index)
        with rounded_products(stream):
            stream.propagate(index, weights)
        count(1)
    return inputs


def _gradient_of_loss(
    stream: Stream, ids: Tensor, measurement: LossMeasurement
) -> tuple[Tensor, dict[str, _Sums]]:
    """The gradient of Σ log p(y) at the outputs of the last block, and the sums of the head."""
    skeleton = stream.skeleton
    head = [skeleton.vocabulary_weights.linear_head] if measurement.outside else []

    def measure(factor: float) -> tuple[Tensor, dict[str, _Sums]]:
        rows, sums = [], measurement.sums(head, stream.device, factor)
        generator = torch.Generator().manual_seed(measurement.seed)
        with _summing(head, sums):
            # Window by window, and without names for what is used once: logits are large.
            for window_ids, hidden in zip(ids.split(1), stream.states.get(0).split(1), strict=True):
                hidden = hidden.detach().requires_grad_()
                with torch.enable_grad(), rounded_products(stream):
                    log_p = (
                        skeleton.logits(window_ids.to(hidden.device), hidden)
                        .flatten(0, -2)
                        .float()
                        .log_softmax(dim=-1)
                    )
                    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
                    (factor * log_p.gather(1, drawn.to(log_p.device)).sum()).backward()
                    del log_p
                assert hidden.grad is not None
                rows.append(hidden.grad)
        return torch.cat(rows), sums

    read = stream.source.read_outside
    with skeleton.outside_blocks(read, stream.device, with_head=True):
        return _in_range(stream, measure)


def _summing(
    linears: Sequence[Linear], sums: Mapping[str, _Sums]
) -> contextlib.AbstractContextManager[None]:
    """While active, the inputs and gradients of linears are added to their sums."""
    return output_hooks(
        linears, lambda linear, x, output: sums[linear.name].add(tokens_of(x.detach()), output)
    )


def _gradient_of_change(stream: Stream, seed: int) -> Tensor:
    """The gradient of Σ z · h / ‖h‖ at the outputs h of the last block, with a z of its own each.

    Its squared product with a change of h has the expected value ‖change‖² / ‖h‖².
    """
    hidden = stream.states.get(0).float()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(hidden.shape, generator=generator).to(hidden.device)
    return drawn / hidden.norm(dim=-1, keepdim=True).clamp_min(1e-12)


class _Sums:
    """Sums over all tokens of one linear: of inputs, and of squared gradients of outputs.

    The Gram matrices of parts of `width` inputs are summed; 0 sums none. The gradients come
    multiplied by `factor`, and are summed without it. With `by_inputs` those of a token are summed
    times its squared input.
    """

    def __init__(
        self, linear: Linear, width: int, device: torch.device, factor: float, by_inputs: bool
    ) -> None:
        inputs = linear.shape[1]
        self.linear, self._factor, self._by_inputs = linear, factor, by_inputs
        self._statistics = InputStatistics(inputs, "norms", device)
        self._parts = [
            InputStatistics(min(width, inputs - start), "gram", device)
            for start in (range(0, inputs, width) if width else ())
        ]
        self._squares_O: Tensor | None = None

    def add(self, x_TI: Tensor, output_TO: Tensor) -> None:
        """Add up the inputs of a linear, and its squared gradients once they are known."""
        if not len(x_TI):
            return
        self._statistics.add(x_TI)
        if self._parts:
            columns = x_TI.split(self._parts[0].in_features, dim=1)
            for part, x_TP in zip(self._parts, columns, strict=True):
                part.add(x_TP)
        if output_TO.requires_grad:
            power_T1 = x_TI.float().square().sum(dim=1, keepdim=True) if self._by_inputs else 1.0
            output_TO.register_hook(lambda gradient_TO: self._add_gradient(gradient_TO, power_T1))

    def _add_gradient(self, gradient: Tensor, power_T1: Tensor | float) -> None:
        gradient_TO = tokens_of(gradient.detach()).float() / self._factor
        squares_O = (gradient_TO.square() * power_T1).sum(dim=0)
        self._squares_O = squares_O if self._squares_O is None else self._squares_O + squares_O

    @property
    def is_finite(self) -> bool:
        """Whether no gradient was beyond the range of its dtype."""
        return self._squares_O is None or all_finite(self._squares_O)

    def without_weight(self, unit: float) -> LinearSensitivity:
        """What inputs and gradients alone say; `unit` is the number of tokens."""
        if self._squares_O is None:
            # No token chose this expert, so give it the smallest sensitivity.
            rows, columns = self.linear.shape
            return LinearSensitivity(torch.full((rows,), 1e-12), importance_I=torch.ones(columns))
        importance_I = (self._statistics.sum_squares_I.float() / self._statistics.tokens).cpu()
        unit *= max(float(importance_I.sum()), 1e-12) if self._by_inputs else 1
        return LinearSensitivity(_shared(self._squares_O / unit).cpu(), importance_I=importance_I)

    def with_feedback(self, damping: float | None, unit: float) -> LinearSensitivity:
        """`without_weight`, where later columns correct the errors of those before them.

        Without Gram matrices nothing is known of that, and it is `without_weight` itself.
        """
        result = self.without_weight(unit)
        if self._squares_O is None or not self._parts:
            return result
        squares_I = self._statistics.sum_squares_I.float()
        power = max(float(squares_I.mean()) / self._statistics.tokens, 1e-12)
        steps_I = torch.cat([_part_steps(part, squares_I, damping) for part in self._parts])
        return replace(result, importance_I=(power / steps_I.square()).cpu())

    def sensitivity(self, damping: float | None, unit: float) -> LinearSensitivity:
        """The sensitivity of the linear; `unit` is the number of tokens."""
        if self._parts:
            return self.with_feedback(damping, unit)
        result, weight_OI = self.without_weight(unit), self.linear.weight_OI.float()
        loss_O = result.loss_O.to(weight_OI.device)
        power_I = result.importance_I.to(weight_OI.device)
        return replace(result, curve_P=_loss_curve(weight_OI, loss_O, power_I))


def _measure_block(
    stream: Stream,
    index: int,
    inputs: Tensor,
    gradient: Tensor,
    measurement: LossMeasurement,
) -> tuple[Tensor, dict[str, _Sums]]:
    """The gradient at the inputs of a block (float32), and the sums of its linears by full name."""
    skeleton, device = stream.skeleton, stream.device
    block = skeleton.fill(index, stream.source.block(index), device)
    linears = [x for x in skeleton.linears(index) if x.name in measurement.selected[index]]
    run = stream.call(index, block)

    def measure(factor: float) -> tuple[Tensor, dict[str, _Sums]]:
        sums = measurement.sums(linears, device, factor)
        hidden = inputs.to(device).detach().requires_grad_()
        with _summing(linears, sums), torch.enable_grad(), rounded_products(stream):
            output = run(hidden)
            output.backward((gradient.to(device) * factor).to(output.dtype))
        assert hidden.grad is not None
        return hidden.grad, sums

    at_inputs, sums = _in_range(stream, measure)
    name = skeleton.block_name(index)
    return at_inputs, {f"{name}.{linear}": x for linear, x in sums.items()}


def _part_steps(part: InputStatistics, squares_I: Tensor, damping: float | None) -> Tensor:
    """U_jj of some inputs, as if the others did not exist, in the unit of all inputs."""
    # `relative_steps` divides by the mean diagonal of its own Gram matrix.
    part_mean = float(part.sum_squares_I.float().mean())
    steps_I = relative_steps(part, damping)
    return (
        steps_I * (float(squares_I.mean()) / part_mean) ** 0.5
        if part_mean > 0
        else torch.ones_like(steps_I)
    )


def _loss_curve(weight_OI: Tensor, loss_O: Tensor, power_I: Tensor) -> Tensor:
    """`LinearSensitivity.curve_P` of all rows, estimated from some of them."""
    rows, columns = weight_OI.shape
    some_R = torch.arange(0, rows, max(1, rows // _CURVE_ROWS), device=weight_OI.device)
    # Within a row Wanda removes the smallest w²·E[x²] first.
    energy_RI = weight_OI[some_R].square().mul_(power_I).sort(dim=1).values
    lost_I = (energy_RI.cumsum(dim=1) * loss_O[some_R, None]).sum(dim=0) * (rows / len(some_R))
    counts = [int(columns * point * CURVE_STEP + 1e-9) for point in range(1, round(1 / CURVE_STEP))]
    zero = torch.zeros_like(lost_I[:1])
    return torch.cat([zero, torch.cat([zero, lost_I])[counts]]).cpu()
