"""After the last block: the scales of a rounded model learn from the dense one.

The integers of all weights stay as they are, and each scale is multiplied by a factor, which takes
no bytes. The factors are trained to lower the Kullback-Leibler divergence of the next-token
distributions from those of the dense model:

    dense model    ► the last hidden states of all windows, stored once
    rounded model  ► for each step: forward block by block ► loss ► backward block by block

Where memory allows, decoded blocks stay in it, and so does what the forward pass computes for the
backward pass. Else blocks are decoded from the shards of the result when their turn comes, and only
their inputs are kept, as in gradient checkpointing. So a model whose result fits in memory can be
trained, whatever its checkpoint takes.

The rate is proportional to the divergence before the training (`_RATE`): the errors of scales are
about as large as those of weights, whose squares the divergence grows with. Norms do not learn:
they win nothing, and on Gemma 3 they take most of the gain away (docs/notes/rounding.md).

Shape suffixes: W windows, S tokens per window; O outputs (rows), I inputs, F factors of a row.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from prunus.calibration.training_text import TrainingText, training_text
from prunus.engine.calibration_windows import window_request
from prunus.engine.command import Run
from prunus.engine.linear_plan import LinearPlan
from prunus.engine.output import ShardFolder
from prunus.engine.progress import PREPARATION, Progress
from prunus.formats.codec import Codec, rescale
from prunus.hardware.machine import peak_memory
from prunus.model.checkpoint.files import remove
from prunus.model.checkpoint.tensor_files import Checkpoint, save_safetensors
from prunus.model.skeleton import Skeleton
from prunus.model.source import bound_skeleton
from prunus.model.stream import Stream
from prunus.rounding.compression_record import CompressionRecord, TuningRecord
from prunus.rounding.loss_sensitivity import rounded_dtype, rounded_products
from prunus.rounding.size_plan import size_plan_of
from prunus.rounding.type_choice import TypeChoice
from prunus.training.checkpoints import Checkpoints
from prunus.training.loop import Learner, Schedule, Step, Training
from prunus.training.loss import next_token_loss

# The tokens of a step, if windows are not longer.
_STEP_TOKENS = 512
# The tokens that are held out, to choose among the states of the training.
_HELD_OUT_TOKENS = 4096
# How often they are scored at most, beside the start and the end, and how many steps lie between.
# A score costs as much as three steps.
_EVALUATIONS, _STEPS_BETWEEN = 8, 8
# The peak rate of the logarithms of factors, in units of the divergence before the training.
_RATE = 0.005
# The most columns that have a factor of their own: more factors learn more noise.
_COLUMNS = 256
# The share of the memory budget that decoded blocks, and what the backward pass needs of them, may
# take, and the share of hidden states.
_KEPT_SHARE, _STATES_SHARE = 0.5, 0.2
# Its multiples, without their whole parts, are spread evenly from 0 to 1.
_GOLDEN = (5**0.5 - 1) / 2
# The file that keeps what was learnt while the shards are written.
_LEARNT = "tuned.safetensors"


def tune(
    run: Run[LinearPlan, CompressionRecord],
    codec: type[Codec],
    choice: TypeChoice,
    folder: ShardFolder,
) -> None:
    """Train the scales of all shards of a run, and write what lowers the loss.

    A killed run continues from the last evaluation, to the same bytes.

    Args:
        run: The run, whose record takes note of the training.
        codec: The format of the result.
        choice: The type of each weight.
        folder: The shards, all of which are written.
    """
    record, checkpoints = run.record, Checkpoints(folder.folder)
    shards, path = _Shards(run.plan, codec, choice, folder), folder.folder / _LEARNT
    if record.tuning is None:
        text = _text_of(run) if shards.factors else None
        if text is None:
            short, none = "the calibration text is too short", "no weight has such scales"
            run.session.tell(f"No scales are trained: {short if shards.factors else none}.")
            return
        with contextlib.ExitStack() as stack:
            learner = _RoundedLearner(run, shards, text, stack)
            schedule = Schedule(
                tokens=record.recipe.tune,
                step_tokens=learner.step_tokens,
                rate=_RATE,
                by_loss=True,
                warmup=0.1,
                evaluations=_evaluations(record.recipe.tune, learner.step_tokens),
                betas=(0.9, 0.95),
            )
            training = Training(learner, schedule, checkpoints, learner.report)
            state = training.run()
            tuning = TuningRecord(
                tokens=record.recipe.tune,
                rate=training.peak_rate,
                factors=sum(x.numel() for x in learner.parameters.values()),
                evaluations=state.evaluations,
                best=state.best,
                stored_loss=learner.stored_loss(),
            )
            if tuning.helps:
                tuning.before = dict(record.sha256)
            save_safetensors(path, {name: x.detach() for name, x in learner.parameters.items()})
            record.tuning = tuning
            folder.save()
    run.session.tell(record.tuning.sentence())
    learnt = load_file(path) if record.tuning.before else {}
    for name, digest in record.tuning.before.items():
        if record.sha256[name] == digest:
            folder.replace_shard(name, shards.tuned(name, learnt))
    record.tuning.before = {}
    folder.save()
    checkpoints.clear()
    remove(path)


def tuning_seconds(plan: LinearPlan, windows: Tensor, tokens: int) -> float:
    """How long `tune` takes, from a step of one block and of the head of the dense model.

    Args:
        plan: The run.
        windows: Windows of any tokens (windows, tokens), at least one.
        tokens: What it trains on.
    """
    seqlen, skeleton = windows.shape[1], plan.skeleton
    count = _windows(_STEP_TOKENS, seqlen)
    ids, middle = windows[:count], min(1, len(skeleton) - 1)
    steps = math.ceil(tokens / ids.numel())
    held_out = math.ceil(_windows(_HELD_OUT_TOKENS, seqlen) / count)
    stream, taken = Stream(skeleton, plan.source, plan.device), list[float]()

    def timed(work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        with rounded_products(stream):
            result = work()
        taken.append(time.perf_counter() - started)
        return result

    with contextlib.closing(stream), torch.no_grad():
        stream.embed([ids], None)
        hidden = stream.states.get(0)
        skeleton.fill(middle, plan.source.block(middle), plan.device)
        run = stream.call(middle)
        timed(lambda: run(hidden))
        with torch.enable_grad():
            inputs = hidden.detach().requires_grad_()
            output = timed(lambda: run(inputs))
            timed(lambda: output.backward(torch.ones_like(output)))
        skeleton.release(middle)
        with skeleton.outside_blocks(plan.source.read_outside, plan.device, with_head=True):
            dense = timed(lambda: skeleton.logits(ids, hidden))
            state = hidden.detach().requires_grad_()
            with torch.enable_grad():
                loss = timed(lambda: next_token_loss(skeleton.logits(ids, state), ids, dense))
                timed(loss.backward)
    forward, with_graph, backward, head, loss_of, back = taken
    step = len(skeleton) * (with_graph + backward) + head + loss_of + back
    # The states of both models at first, and the evaluations beside the steps.
    passes = len(skeleton) * forward
    scores = _evaluations(tokens, ids.numel()) + 2
    evaluations = scores * held_out * (passes + head + loss_of)
    return steps * step + (steps + held_out) * passes + evaluations


def _windows(tokens: int, seqlen: int) -> int:
    """The number of windows of `seqlen` tokens each that have about `tokens` tokens, at least 1."""
    return max(1, tokens // seqlen)


def _evaluations(tokens: int, step_tokens: int) -> int:
    """How often the held-out windows are scored in a training, beside the start and the end."""
    return min(_EVALUATIONS, max(1, tokens // (step_tokens * _STEPS_BETWEEN)))


class _Shards:
    """The rounded model in the shards of a run: a `WeightSource` of dense weights.

    Attributes:
        factors: Full name of each weight whose scales are trained -> the shape of its factors.
    """

    def __init__(
        self, plan: LinearPlan, codec: type[Codec], choice: TypeChoice, folder: ShardFolder
    ) -> None:
        self.plan, self.codec, self.folder, self.choice = plan, codec, folder, choice
        self.source, self.record = plan.checkpoint, folder.record
        self.config, self.fingerprint = self.source.config, self.source.fingerprint
        self.stored_dtype = self.source.stored_dtype
        self.factors: dict[str, tuple[int, int]] = {}
        for block in self.record.blocks:
            for linear, what in block.linears.items():
                if "kept_values" in what.notes:
                    continue  # It lost nothing.
                quantizer = choice.quantizers[f"{block.name}.{linear}"]
                if not quantizer.has_coarse_scale:
                    spans = what.shape[1] // quantizer.span
                    shared = max(
                        x
                        for x in range(1, spans + 1)
                        if spans % x == 0 and (x == 1 or x * quantizer.span <= _COLUMNS)
                    )
                    self.factors[f"{block.name}.{linear}.weight"] = (what.shape[0], spans // shared)

    def bind(self, skeleton: Skeleton) -> None:
        """The source is bound already."""

    def block_nbytes(self, index: int) -> int:
        """Bytes of a block of the source."""
        return self.source.block_nbytes(index)

    def block(self, index: int, pinned: bool = False) -> dict[str, Tensor]:
        """The tensors of a block by relative name, with rounded linears dense."""
        return self.folder.restored(index)

    def tuned_block(self, index: int, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same after the training, as it is stored."""
        return self.folder.dense(index, self.tuned(self.record.shard(index), learnt))

    def read_outside(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors outside the blocks by the model's names, with embedding and head dense."""
        tensors = self._read(self.record.outside_shard)
        for name in size_plan_of(self.plan).outside:
            key = self.source.weight_key(name)
            tensors[key] = self.codec.decode(key, tensors, self.choice.quantizers[name])
        keys = self.source.stored_names
        return {name: tensors[keys[name]] for name in names if name in keys}

    def tuned(self, shard: str, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a shard after the training, as they are stored.

        Args:
            shard: Its file name.
            learnt: What was trained, by name in the model.
        """
        tensors = self._read(shard)
        blocks = {self.record.shard(i): f"{x.name}." for i, x in enumerate(self.record.blocks)}
        for name, change in learnt.items():
            if name.startswith(blocks.get(shard, " ")):
                module = name.removesuffix(".weight")
                quantizer = self.choice.quantizers[module]
                key = self.source.weight_key(module)
                spans = self._columns(module) // quantizer.span
                factor_OS = change.exp().repeat_interleave(spans // change.shape[1], dim=1)
                rescale(self.codec, key, tensors, quantizer, factor_OS)
        return tensors

    def _columns(self, module: str) -> int:
        """The columns of a weight."""
        return int(self.plan.skeleton.model.get_submodule(module).weight.shape[1])

    def _read(self, shard: str) -> dict[str, Tensor]:
        opened = Checkpoint(self.folder.folder, only=[shard])
        return dict(opened.read(opened.tensors))


class _RoundedLearner(Learner):
    """The rounded model, which learns from the dense one; see the top of this file.

    Args:
        run: The run.
        shards: The rounded model.
        text: The windows.
        stack: Ends what stays open while the model learns.

    Attributes:
        parameters: Logarithms of factors (O, F), all 0 at first.
        batch: The windows of a step.
        step_tokens: Its tokens.
        text: The windows.
    """

    def __init__(
        self,
        run: Run[LinearPlan, CompressionRecord],
        shards: _Shards,
        text: TrainingText,
        stack: contextlib.ExitStack,
    ) -> None:
        plan = self._plan = run.plan
        self._session, self._shards, self._skeleton = run.session, shards, plan.skeleton
        self.text = text
        seqlen = text.held_out.shape[1]
        self.batch = _windows(_STEP_TOKENS, seqlen)
        self.step_tokens = self.batch * seqlen
        steps = self._steps = math.ceil(run.record.recipe.tune / self.step_tokens)
        self._ids = [self.text.windows(i * self.batch, self.batch) for i in range(steps)]
        self._ids += self.text.held_out.split(self.batch)
        self._learnt: Mapping[str, Tensor] | None = None
        self.parameters = {
            name: nn.Parameter(torch.zeros(shape, device=plan.device))
            for name, shape in shards.factors.items()
        }
        self._decoded: set[int] = set()
        size = sum(map(shards.block_nbytes, range(len(plan.skeleton))))
        size = size // plan.source.stored_dtype.itemsize * plan.skeleton.dtype.itemsize
        # Weights as they were and with their factors, and inputs and outputs of linears, twice.
        values = sum(sum(x.shape) for x in plan.skeleton.blocks.parameters() if x.dim() > 1)
        size = 2 * size + 4 * self.step_tokens * values * plan.skeleton.dtype.itemsize
        self._keeps = size <= _KEPT_SHARE * plan.memory.budget
        width = plan.skeleton.window_shape(0, 1)[1]
        states = sum(x.numel() for x in self._ids) * width * plan.skeleton.dtype.itemsize
        spills = 2 * states > _STATES_SHARE * plan.memory.host_budget
        spill_to = run.spill_folder if spills else None
        dense = Stream(plan.skeleton, plan.source, plan.device)
        self._rounded = Stream(plan.skeleton, shards, plan.device)
        stack.callback(dense.close)
        stack.callback(self._rounded.close)
        blocks = range(len(plan.skeleton))
        count = run.session.preparing("the dense model's outputs", len(blocks), plan.device)
        with torch.no_grad(), rounded_products(dense):
            dense.embed(self._ids, spill_to)
            for index in blocks:
                dense.propagate(index, plan.source.block(index))
                count(1)
            self._rounded.embed(self._ids, spill_to)
        self._targets = dense.states
        self._teacher = bound_skeleton(
            plan.checkpoint, plan.options.trust_remote_code, plan.skeleton.dtype
        )
        for skeleton, source in ((self._teacher, plan.source), (plan.skeleton, shards)):
            stack.enter_context(
                skeleton.outside_blocks(source.read_outside, plan.device, with_head=True)
            )

    def add_gradients(self, step: int) -> float:
        """See `Learner`."""
        with torch.enable_grad():
            return self._pass(step, learns=True)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The mean divergence on the held-out windows, in nats per token."""
        numbers = range(self._steps, len(self._ids))
        losses = [self._pass(x, learns=False) * len(self._ids[x]) for x in numbers]
        return sum(losses) / len(self.text.held_out)

    def stored_loss(self) -> float:
        """The same with what was learnt rounded as it will be stored."""
        self._learnt = {name: x.detach().cpu() for name, x in self.parameters.items()}
        self._forget_blocks()
        loss = self.held_out_loss()
        self._learnt = None
        self._forget_blocks()
        return loss

    def refuse_not_finite(self, loss: float) -> None:
        """The rounded model is named; its blocks gave finite outputs before."""
        raise ValueError(f"the divergence of the rounded model is {loss}: leave `tune` out")

    def words(self, loss: float) -> str:
        """The divergence."""
        return f"held-out divergence {loss:.4f}"

    def report(self, step: Step) -> None:
        """Tell the session how far the training is."""
        left = step.seconds * (1 - step.fraction) / step.fraction if step.fraction else None
        peak, done = peak_memory(self._plan.device), round(step.fraction * self._steps)
        what = f"tuning scales, {step.message}"
        unit = f"{PREPARATION}tuning scales"
        self._session.tell(Progress(done, self._steps, what, step.seconds, peak, unit, left))

    def _pass(self, number: int, learns: bool) -> float:
        """The mean divergence on a batch of windows; with `learns`, gradients are added."""
        hidden, blocks = self._rounded.states.get(number), range(len(self._skeleton))
        passed: list[tuple[Tensor, Tensor]] = []
        for index in blocks:
            inputs = hidden.detach().requires_grad_(learns and index > 0)
            with torch.set_grad_enabled(learns and self._keeps):
                hidden = self._run(index, inputs)
            passed.append((inputs, hidden))
        loss, gradient = self._compare(number, hidden, learns)
        for index in reversed(blocks if learns else ()):
            inputs, hidden = passed.pop()
            output = hidden if self._keeps else self._run(index, inputs)
            output.backward(gradient.to(output.dtype))
            gradient = inputs.grad if inputs.grad is not None else gradient
        return loss

    def _compare(self, number: int, hidden: Tensor, learns: bool) -> tuple[float, Tensor]:
        """The mean divergence of a batch, and its gradient at the outputs of the last block."""
        ids, targets = self._ids[number].to(hidden.device), self._targets.get(number)
        total, rows = 0.0, []
        # Window by window: logits are large.
        for one, target, state in zip(*(x.split(1) for x in (ids, targets, hidden)), strict=True):
            state = state.detach().requires_grad_(learns)
            with rounded_products(self._rounded) if learns else contextlib.nullcontext():
                with torch.no_grad():
                    dense = self._teacher.logits(one, target)
                loss = next_token_loss(self._skeleton.logits(one, state), one, dense) / len(ids)
            if learns:
                loss.backward()
                assert state.grad is not None
                rows.append(state.grad)
            total += float(loss.detach())
        return total, torch.cat(rows) if rows else hidden

    def _run(self, index: int, hidden: Tensor) -> Tensor:
        """Run a block with its weights as they are now."""
        block, name = self._filled(index), self._skeleton.block_name(index)
        weights: dict[str, Tensor] = {}
        for relative, before in block.named_parameters() if self._learnt is None else ():
            full = f"{name}.{relative}"
            if full in self.parameters:
                weights[relative] = self._scaled(full, before)

        def with_weights(*args: Any, **kwargs: Any) -> Any:
            return functional_call(block, weights, args, kwargs)

        with rounded_products(self._rounded):
            output = self._rounded.call(index, with_weights)(hidden)  # type: ignore[arg-type]
        if not self._keeps:
            self._skeleton.release(index)
            self._decoded.discard(index)
        return output

    def _scaled(self, name: str, before_OI: Tensor) -> Tensor:
        """A weight times its factors."""
        order = self._shards.choice.quantizers[name.removesuffix(".weight")].columns
        step = torch.finfo(rounded_dtype(self._rounded)).eps
        if not order:
            return _Scaled.apply(before_OI, self.parameters[name], step)
        columns = torch.tensor(order, device=before_OI.device)
        sorted_OI = _Scaled.apply(before_OI[:, columns], self.parameters[name], step)
        return sorted_OI[:, columns.argsort()]

    def _filled(self, index: int) -> nn.Module:
        """A block with the weights that it had before the training, or as they will be stored."""
        if index not in self._decoded:
            shards, learnt = self._shards, self._learnt
            tensors = shards.block(index) if learnt is None else shards.tuned_block(index, learnt)
            self._skeleton.fill(index, tensors, self._plan.device)
            self._decoded.add(index)
        return self._skeleton.blocks[index]

    def _forget_blocks(self) -> None:
        for index in self._decoded:
            self._skeleton.release(index)
        self._decoded.clear()


class _Scaled(torch.autograd.Function):
    """A weight (O, I) whose columns are multiplied by the factors (O, F) of their parts.

    The gradient of the logarithm of a factor is the sum of gradient times weight over its part.

    Before, weights lie on the grid of the dtype of the products, and a change of less than half a
    step would leave all of them as they are. So each column is changed by another share of a step
    too, and the change moves as large a part of the columns to the next step.
    """

    @staticmethod
    def forward(ctx: Any, before_OI: Tensor, change_OF: Tensor, step: float) -> Tensor:
        # One pass over memory, in which only the small change is rounded to the weight's dtype.
        before_OFC = before_OI.unflatten(1, (change_OF.shape[1], -1))
        columns = torch.arange(before_OFC.shape[2], device=before_OI.device)
        share_C = (columns * _GOLDEN) % 1 - 0.5
        small_OFC = change_OF.expm1()[..., None] + share_C * step
        after_OFC = torch.addcmul(before_OFC, before_OFC, small_OFC.to(before_OI.dtype))
        ctx.save_for_backward(after_OFC)
        return after_OFC.flatten(1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, Tensor, None]:
        (after_OFC,) = ctx.saved_tensors
        gradient_OFC = outer[0].reshape(after_OFC.shape)
        return None, torch.linalg.vecdot(gradient_OFC, after_OFC).float(), None


def _text_of(run: Run[LinearPlan, CompressionRecord]) -> TrainingText | None:
    """The text of the calibration, or the windows that the caller gave; None if it is too short."""
    plan, recipe = run.plan, run.plan.recipe
    with contextlib.suppress(ValueError):
        if plan.options.calibration_data is not None:
            held_out = _windows(_HELD_OUT_TOKENS, run.windows.shape[1])
            held_out = min(held_out, max(1, len(run.windows) // 4))
            return TrainingText(iter(run.windows), recipe.calibration, held_out, recipe.seed)
        request = window_request(plan)
        held_out = _windows(_HELD_OUT_TOKENS, request.seqlen)
        return training_text(recipe.calibration, request, held_out)
    return None
