"""How each linear is rounded, from what its errors mean to the loss of the dense model.

It begins with a measurement (`loss_sensitivity.py`) on rank 0, because all processes must use the
same digits. Then each weight gets the type of least loss that the size allows.

    type_rounding    a type for each weight; `write_lists` chooses them for other programs
    try_types        a trial of this and of what follows the blocks, for the time of a run

Shape suffixes: O outputs (rows), R some of them, I inputs.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from prunus.compression.tuning import tune, tuning_seconds
from prunus.distributed import on_rank_0, tensors_from_rank_0
from prunus.engine.block.change_block import BlockChanger
from prunus.engine.calibration_windows import calibration_windows
from prunus.engine.command import Run
from prunus.engine.folder import ResultFolder
from prunus.engine.forecast import Trial, two_blocks
from prunus.engine.linear_plan import LinearPlan
from prunus.engine.output import Rounding
from prunus.engine.result import MEASUREMENT
from prunus.engine.session import Session, shown_session
from prunus.formats.codec import Codec
from prunus.methods.statistics import InputStatistics
from prunus.model.checkpoint.tensor_files import Writable, save_safetensors
from prunus.rounding.compression_record import CompressionRecord
from prunus.rounding.group_fits import round_to_nearest, rounded_rows
from prunus.rounding.group_quantizer import GroupedWeight, GroupQuantizer, check_range
from prunus.rounding.group_sweep import GroupRounding, round_weight
from prunus.rounding.lattice import lossless_type, on_lattice
from prunus.rounding.loss_sensitivity import LinearSensitivity, LossMeasurement, measure_loss
from prunus.rounding.measuring_trial import try_measurement
from prunus.rounding.size_plan import SizePlan, TypedWeight, size_plan_of
from prunus.rounding.type_choice import Measurement, TypeChoice
from prunus.words import naming

# Rows of the output head that are rounded together: a part of it in float32, not all.
_HEAD_ROWS = 2**14
# Rows sampled to estimate each type's loss: 16 per weight, at least 4 when several weights share a
# type. 8 rows, in proportion to what errors in them cost, estimate the loss of a linear of
# SmolLM2-135M within 5 % (root mean square), and 64 rows at equal distances within 10 %.
_ROWS, _LEAST_ROWS = 16, 4
# Weights whose squares are summed at once: few enough for the cache of a processor, which takes a
# tenth of the time of 1,024 rows.
_SQUARED = 2**17
# Rows of embedding or head that a trial rounds: the time of the others follows from theirs.
_TRIED_ROWS = 4096
# The least squared length and the least sensitivity of a row, as far as rows are sampled by them.
_LEAST = 1e-100
# A type that loses the share ε² of what a weight contributes raises the loss of the model by
# 1 / (1 - 8 ε²) times the sum of its independent errors, but by no more than five times. Whole
# models choose this factor, and those of one type show that there is one: relative to types of
# three bits, Q2_K and IQ2_S (ε² = 0.06) raise the loss by 1.55 times the sum, and IQ2_XXS (0.1) by
# twice the sum, in a Llama of 34 million weights.
_COHERENCE, _LEAST_REST = 8.0, 0.2


def type_rounding(run: Run[LinearPlan, CompressionRecord], codec: type[Codec]) -> Rounding:
    """The rounding to the types of least loss, which the record takes note of.

    Args:
        run: The run, whose folder keeps the measurement for a resumed run.
        codec: The format of the result.
    """
    plan, session, record = run.plan, run.session, run.record
    size_plan, source = size_plan_of(plan), plan.checkpoint
    assert run.folder is not None, "compress writes a new result"
    tensors = tensors_from_rank_0(functools.partial(_measured_once, run, run.folder))
    if not size_plan.lasting.tensors().keys() <= tensors.keys():
        raise FileExistsError(
            f"{size_plan.request.recipe.template} is not the file that this run began with: put it "
            "back as it was, or choose `overwrite` to start again"
        )
    choice = size_plan.choose(Measurement.of(tensors))
    if record.types not in ({}, choice.types):
        recipe = size_plan.request.recipe
        raise FileExistsError(
            f"{recipe.types_from or recipe.fast_on} has other types than the finished blocks: the "
            "file was changed since. Put it back as it was, or choose `overwrite` to start again"
        )
    record.types, record.unmatched = choice.types, dict(size_plan.unmatched)
    on_rank_0(lambda: _check_outside(size_plan, choice))
    if said := size_plan.said(choice):
        session.tell(said)

    def encode(name: str, weight: GroupedWeight) -> dict[str, Tensor]:
        return codec.encode(source.weight_key(name), weight, source.weight_dtype(name))

    def decode(name: str, parts: dict[str, Tensor]) -> Tensor:
        return codec.decode(source.weight_key(name), parts, choice.quantizers[name])

    def outside(dense: dict[str, Writable], head: InputStatistics | None) -> dict[str, Writable]:
        """The tensors outside the blocks, with embedding and head in their types."""
        if head is not None and size_plan.head is not None:
            head.add_uncorrelated(choice.importances[size_plan.head] * head.tokens)
        dense = {key: tensor for key, tensor in dense.items() if key not in size_plan.left_out}
        for name, keys in size_plan.outside.items():
            for key in keys:
                del dense[key]
            dense |= encode(name, rounded_outside(plan, name, choice, head))
        return dense

    # Errors of the head are corrected by its later columns, if they are measured: an embedding that
    # is tied to it has errors of its own, which must be known too.
    corrects = plan.recipe.rounds == "feedback" and size_plan.head in choice.importances
    changes = bool(size_plan.outside or size_plan.left_out)
    tuning = functools.partial(tune, run, codec, choice) if record.recipe.tune else None
    outside_or_none = outside if changes else None
    return Rounding(choice.rounding, encode, decode, outside_or_none, corrects, tuning)


def _measured_once(
    run: Run[LinearPlan, CompressionRecord], folder: ResultFolder
) -> dict[str, Tensor]:
    """The measurement of the run, or that of the run which is resumed, as named tensors."""
    path = folder.folder / MEASUREMENT
    if path.exists():
        return load_file(path)
    tensors = measured(run.plan, run.session, run.windows, run.record.measured).tensors()
    folder.save()
    save_safetensors(path, tensors)
    return tensors


def _check_outside(size_plan: SizePlan, choice: TypeChoice) -> None:
    """Check before the first block that the types of embedding and head reach their weights.

    Raises:
        ValueError: They do not; the message names the weight.
    """
    for name, [key, *_] in size_plan.outside.items():
        with naming(key):
            check_range(size_plan.request.source.checkpoint.whole(key), choice.quantizers[name])


def rounded_outside(
    plan: LinearPlan,
    name: str,
    choice: TypeChoice,
    head: InputStatistics | None,
    rows: int | None = None,
) -> GroupedWeight:
    """The weight of an embedding or a head in its type.

    Args:
        plan: The run.
        name: Name of the module.
        choice: The type of each weight.
        head: The inputs of the output head, and what its errors cost as an embedding. Without them
            the head is rounded by its importance, as an embedding always is.
        rows: Round only this number of rows, to see how long that takes; None rounds all.

    Raises:
        ValueError: Weights are beyond the values of the type; the message names the weight.
    """
    key, quantizer = plan.checkpoint.weight_key(name), choice.quantizers[name]
    weight_OI = plan.checkpoint.checkpoint.whole(key)[:rows]
    if (kept := on_lattice(weight_OI, quantizer)) is not None:
        return kept
    with naming(key):
        if head is None or name != size_plan_of(plan).head:
            return round_to_nearest(weight_OI, quantizer, choice.importances.get(name))
        work = replace(plan.work, rounding=GroupRounding(quantizer))
        parts = []
        for rows_OI in weight_OI.split(_HEAD_ROWS):
            rows_OI = rows_OI.to(plan.device, torch.float32)
            grouped = round_weight(rows_OI, head, work).rounded
            assert isinstance(grouped, GroupedWeight)
            parts.append(grouped.data_OB.cpu())
        return GroupedWeight(quantizer, torch.cat(parts))


def write_lists(
    plan: LinearPlan, types_file: Path | None, importances_file: Path | None, progress: bool
) -> TypeChoice:
    """Choose the types of a planned GGUF file, and write them for llama-quantize of llama.cpp.

    Args:
        plan: The plan.
        types_file: Where the list of types is written; None for nowhere.
        importances_file: Where the importance matrix is written; None for nowhere.
        progress: Whether to show a bar where a person looks.

    Returns:
        The type of each weight.

    Raises:
        ValueError, FileExistsError: As `SizePlan.check_lists`.
    """
    size_plan = size_plan_of(plan)
    size_plan.check_lists([path for path in (types_file, importances_file) if path is not None])
    with shown_session("plan", progress, None) as session:
        choice = size_plan.choose(measured(plan, session, calibration_windows(plan).ids, {}))
    size_plan.write_lists(choice, types_file, importances_file)
    return choice


def measured(
    plan: LinearPlan,
    session: Session,
    ids: Tensor,
    digests: dict[str, str],
) -> Measurement:
    """Measure what each type of each weight adds to the loss, if the format chooses by it.

    Importances of embedding and head are those as an embedding, in units of the mean square of an
    input of the head. Where each weight is rounded by itself, what errors cost as the head is
    added, and all linears have theirs, E[x_j²].
    """
    size_plan = size_plan_of(plan)
    if not size_plan.measures_loss:
        return size_plan.lasting
    sensitivities = _sensitivities(plan, session, ids, digests)
    count = session.preparing(
        "rounding some rows of each weight to every type", len(size_plan.weights), plan.device
    )
    found = _measured_types(plan, sensitivities, size_plan.weights, lambda _: count(1))
    return replace(size_plan.lasting, losses=found.losses, importances=found.importances)


def _sensitivities(
    plan: LinearPlan, session: Session, ids: Tensor, digests: dict[str, str]
) -> dict[str, LinearSensitivity]:
    """Full name -> what errors of each linear cost; the arguments are as of `measure_loss`."""
    aim = LossMeasurement(
        plan.selected,
        plan.work.options.damping,
        plan.recipe.seed,
        feedback=plan.recipe.rounds == "feedback",
        outside=True,
        by_inputs=size_plan_of(plan).by_inputs,
    )
    return measure_loss(plan, session, ids, digests, aim)


def _measured_types(
    plan: LinearPlan,
    sensitivities: Mapping[str, LinearSensitivity],
    weights: Mapping[str, TypedWeight],
    done: Callable[[str], None],
) -> Measurement:
    """What each type of some weights adds to the loss, and the importances; see `measured`.

    Args:
        plan: The run.
        sensitivities: What `_sensitivities` returned.
        weights: First module of each weight -> the weight.
        done: Called with the first module of each weight once that is measured.
    """
    losses: dict[str, Tensor] = {}
    importances: dict[str, Tensor] = {}
    corrects = plan.recipe.rounds == "feedback"
    model, linears = plan.skeleton.model, plan.selected_linears()
    modules = dict(model.named_modules())
    head = sensitivities[plan.skeleton.vocabulary_weights.linear_head.name]
    uses: dict[int, list[LinearSensitivity]] = {}
    for name, sensitivity in sensitivities.items():
        # A tied head has another name than the embedding, and the same weight.
        uses.setdefault(id(modules[name].weight), []).append(sensitivity)
    for first, weight in weights.items():
        names, parts = weight.modules, []
        for name in names:
            weight_OI = plan.checkpoint.weight(f"{name}.weight")
            of_name = uses[id(modules[name].weight)]
            with naming(name):
                parts.append(type_losses(weight_OI, of_name, weight.quantizers, len(names)))
            if name in linears and not corrects:
                importances[name] = sensitivities[name].importance_I
        if first not in linears:
            importance_I = torch.zeros(weight.shape[-1])
            # Feedback learns what errors cost as the head from the inputs of all windows.
            for use in (
                x for x in uses[id(modules[first].weight)] if x is not head or not corrects
            ):
                importance_I += use.importance_I * (use.loss_O.mean() / head.loss_O.mean())
            importances[first] = importance_I
        losses[first] = torch.stack(parts).sum(dim=0)
        done(first)
    return Measurement(losses=losses, importances=importances)


def type_losses(
    weight_OI: Tensor,
    uses: Sequence[LinearSensitivity],
    quantizers: Sequence[GroupQuantizer],
    stacked: int = 1,
) -> Tensor:
    """The expected loss increase of each type (types,).

    The smallest type whose values the weight has already loses nothing; see `rounding/lattice.py`.
    The loss of an error e is half of Σ s_i E[e_i²], see `rounding/loss_sensitivity.py`; the factor
    ½ is the same for all types and left out. Coarse types lose more than this sum, because their
    errors depend on each other and on those of other linears; see `_COHERENCE`.

    Args:
        weight_OI: The weight, (O, I) in any float dtype.
        uses: The sensitivity of each module with this weight: an embedding may be the head too.
        quantizers: The quantisers of the types.
        stacked: How many weights share one type. There are fewer sampled rows per weight where
            several share a type.
    """
    some_R, counts_R = _sampled_rows(weight_OI, uses, max(_LEAST_ROWS, _ROWS // stacked))
    rows_RI, losses = weight_OI[some_R].float(), []
    importance_I = torch.stack([use.loss_O.sum() * use.importance_I for use in uses]).sum(dim=0)

    def loss_of(error_RI: Tensor) -> Tensor:
        square_RI = error_RI.square()
        parts = [square_RI @ use.importance_I @ (use.loss_O[some_R] * counts_R) for use in uses]
        return torch.stack(parts).sum()

    all_lost = loss_of(rows_RI).clamp_min(1e-30)
    for quantizer in quantizers:
        loss = loss_of(rounded_rows(rows_RI, quantizer, importance_I).sub_(rows_RI))
        losses.append(loss / (1 - _COHERENCE * loss / all_lost).clamp_min(_LEAST_REST))
    lossless = lossless_type(weight_OI, quantizers)
    return torch.tensor(losses) * torch.tensor([x is not lossless for x in quantizers])


def _sampled_rows(
    weight_OI: Tensor, uses: Sequence[LinearSensitivity], count: int
) -> tuple[Tensor, Tensor]:
    """Some rows of a weight, and for how many rows each of them stands; int64 and float32 (R,).

    Errors of a row cost about as much as its sensitivity times its squared length: the steps of a
    row grow with its weights. So rows are taken at equal distances of the sum of this cost. A row
    that costs much is taken several times, and then stands for a part of itself.

    Args:
        weight_OI: The weight, (O, I) in any float dtype.
        uses: The sensitivity of each module with this weight.
        count: The number of rows R; a weight that has no more is taken as it is.
    """
    if len(weight_OI) <= count:
        return torch.arange(len(weight_OI)), torch.ones(len(weight_OI))
    parts = weight_OI.split(max(1, _SQUARED // weight_OI.shape[1]))
    square_O = torch.cat([rows_OI.double().square().sum(dim=1) for rows_OI in parts])
    each_O = torch.stack([use.loss_O * use.importance_I.sum() for use in uses]).sum(dim=0)
    # A weight that is zero, or so large that nothing finite was measured, has rows too.
    cost_O = square_O.clamp_min_(_LEAST) * each_O.double().nan_to_num_(0, 0, 0).clamp_min_(_LEAST)
    total_O = cost_O.cumsum(0)
    places_R = (torch.arange(count) + 0.5) * (total_O[-1] / count)
    some_R = torch.searchsorted(total_O, places_R)
    return some_R, (total_O[-1] / count / cost_O[some_R]).float()


def try_types(plan: LinearPlan, windows: Tensor, tune_tokens: int) -> Trial:
    """Measure two blocks, and give all others the types of theirs.

    Args:
        plan: The run.
        windows: Some of its windows (windows, tokens).
        tune_tokens: The tokens of `tune`; 0 for none.
    """
    size_plan, path = size_plan_of(plan), f"{plan.skeleton.path}."
    seconds, measurement = 0.0, size_plan.lasting
    if size_plan.measures_loss:
        seconds, sensitivities = try_measurement(plan, windows, _sensitivities)
        # First module of a weight -> the one of the first two blocks that stands for it.
        in_block = re.compile(rf"(?<=^{re.escape(path)})\d+")
        stands = {
            name: in_block.sub(lambda index: str(int(index[0]) % 2), name)
            for name in size_plan.weights
        }
        tried = {name: size_plan.weights[name] for name in dict.fromkeys(stands.values())}
        started, ends = time.perf_counter(), dict[str, float]()
        found = _measured_types(
            two_blocks(plan),
            sensitivities,
            tried,
            lambda name: ends.update({name: time.perf_counter()}),
        )
        for name, end in ends.items():
            times = len(plan.skeleton) / 2 if name.startswith(path) else 1
            seconds, started = seconds + times * (end - started), end
        losses = {name: found.losses[other] for name, other in stands.items()}
        measurement = replace(measurement, losses=losses, importances=found.importances)
    choice = size_plan.choose(measurement)

    def after(changer: BlockChanger, batches: list[Tensor]) -> float:
        """Seconds of the statistics of the head, of rounding outside the blocks, and of `tune`."""
        started, head = time.perf_counter(), None
        if plan.recipe.rounds == "feedback" and size_plan.head in choice.importances:
            head = changer.head_statistics(batches)
        taken = time.perf_counter() - started
        for name in size_plan.outside:
            # The first time has what is done once for all rows.
            for parts in (1, size_plan.weights[name].shape[0] / _TRIED_ROWS - 1):
                started = time.perf_counter()
                rounded_outside(plan, name, choice, head, _TRIED_ROWS)
                taken += max(0.0, parts) * (time.perf_counter() - started)
        return taken + (tuning_seconds(plan, windows, tune_tokens) if tune_tokens else 0.0)

    return Trial(seconds, choice.rounding, after)
