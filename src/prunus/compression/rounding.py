"""How each linear is rounded, from what its errors mean to the loss of the dense model.

Both ways begin with a measurement (`loss_sensitivity.py`) on rank 0, because all ranks must use the
same digits. A `RateFormat` spends its bits by a rate control. In a `TypeFormat` each weight
gets the type of least loss that the size allows.

    rate_rounding ► RateRounding     steps and bits of each linear
    type_rounding ► TypeRounding     a type for each weight

Shape suffixes: O outputs (rows), R some of them, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunus.compression.rate_control import LinearRate, RateControl
from prunus.engine.block.linear import PackedLinear
from prunus.engine.linear_job import PruningJob
from prunus.engine.loss_sensitivity import LinearSensitivity, measure_loss
from prunus.engine.output import PruningOutput
from prunus.engine.session import Session
from prunus.formats.base import RateFormat, TypeFormat
from prunus.formats.records import CompressionRecord
from prunus.hardware.errors import naming
from prunus.methods.group_fits import round_in_groups
from prunus.methods.group_quantizer import GroupedWeight, GroupQuantizer
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import LinearQuantization, Quantized
from prunus.runtime.description import QuantizedShape
from prunus.runtime.planes import encode
from prunus.runtime.weight import QuantizedWeight

# A linear is rounded again at most this many times, and each time coarser by at least this log2.
_MOST_TRIALS, _COARSER = 16, 0.002
# Rows sampled to estimate each type's loss: 64 per weight, at least 8 when several weights share a
# type.
_ROWS, _LEAST_ROWS = 64, 8
# The two kinds of tensors that a measurement of types gives; a name of a module follows.
_LOSSES, _IMPORTANCES = "losses/", "importances/"


def rate_rounding(
    stored: RateFormat,
    job: PruningJob,
    session: Session,
    ids: Tensor,
    output: PruningOutput,
    record: CompressionRecord,
) -> RateRounding:
    """The rounding that spends the bits of the recipe, after the blocks of an earlier run.

    Args:
        stored: The format of the result.
        job: The run.
        session: Its processes, and who hears of the measurement.
        ids: Its calibration windows (windows, tokens).
        output: The folder of the result, which keeps the measurement for a resumed run.
        record: The record of the run, with the blocks that an earlier run has finished.
    """
    ranks = session.ranks
    tensors = ranks.tensors_from_rank_0(
        lambda: output.measured(lambda: _sensitivities(job, session, ids, record.measured))
    )
    linears = [
        LinearRate(
            name,
            linear.name,
            linear.shape,
            LinearSensitivity(
                loss_O=tensors[f"{name}.loss"],
                power=float(tensors[f"{name}.power"]),
                deviations_Q=tensors[f"{name}.deviations"],
            ),
        )
        for name, linear in job.selected_linears().items()
    ]
    sparsity = job.recipe.sparsity
    sparsities = {x.name: record.allocation.get(x.name, sparsity) for x in linears}
    bits = stored.bits
    if stored.recipe.size is not None:
        # Embeddings and head are written by now, and take a little less than was planned. The
        # folder of the result is also the one for hidden states that do not fit in memory.
        shard = output.spill_folder / record.outside_shard
        bits = stored.bits_next_to(ranks.on_rank_0(lambda: shard.stat().st_size))
    control = RateControl(bits, linears, sparsities)
    for block in record.blocks:
        for name, linear_record in block.linears.items():
            assert linear_record.bits is not None and linear_record.log2_step is not None
            control.finish(f"{block.name}.{name}", linear_record.bits, linear_record.log2_step)
    return RateRounding(control, exceeds=stored.recipe.size is None)


class RateRounding:
    """Rounds linears to the steps of a rate control; see `prunus.engine.block.linear`.

    Args:
        control: Chooses the steps.
        exceeds: Whether the sum may be a little more than the bits of the control. If not, a linear
            that leaves too little for those after it is rounded again, to coarser steps.
    """

    def __init__(self, control: RateControl, exceeds: bool) -> None:
        self._control, self._exceeds = control, exceeds
        self._log2_step, self._coarser, self._trials = 0.0, 0.0, 0

    def begin(self, name: str, statistics: InputStatistics) -> LinearQuantization:
        """How the linear of this full name is quantised, by the statistics of its inputs."""
        quantization, self._log2_step = self._control.begin(name, statistics, self._coarser)
        return quantization

    def end(
        self, name: str, quantized: Quantized | GroupedWeight
    ) -> tuple[QuantizedWeight, dict[str, Any]] | None:
        """Encode a linear and count its bits.

        Returns:
            The encoded weight, and fields of its `LinearRecord`; None asks for coarser steps.

        Raises:
            ValueError: Its bits do not fit in `size`, however coarse the steps are.
        """
        assert isinstance(quantized, Quantized)
        levels_OI, steps_I, scales_O = (part.cpu() for part in quantized)
        packed = encode(levels_OI, steps_I, scales_O)
        rows, columns = packed.shape
        bits = 8 * packed.nbytes / (rows * columns)
        excess = 0.0 if self._exceeds else self._control.excess(name, bits)
        if excess > 0 and self._trials < _MOST_TRIALS:
            self._trials += 1
            # At low rates a step saves less than a bit where it is twice as coarse.
            self._coarser += max(_COARSER, excess) * 1.5**self._trials
            return None
        if excess > 0:
            raise ValueError(
                f"{name} does not fit in what `size` leaves for it: give a larger size"
            )
        self._coarser, self._trials = 0.0, 0
        self._control.finish(name, bits, self._log2_step)
        entry = QuantizedShape.of(packed).to_json()
        return packed, {"bits": bits, "log2_step": self._log2_step, "packed": entry}


def _sensitivities(
    job: PruningJob, session: Session, ids: Tensor, digests: dict[str, str]
) -> dict[str, Tensor]:
    """The sensitivity of each linear, as three named tensors; see `measure_loss`."""
    sensitivities = measure_loss(
        job, session, ids, digests, job.selected, job.work.options, quantizes=True
    )
    tensors = {}
    for name, sensitivity in sensitivities.items():
        tensors[f"{name}.loss"] = sensitivity.loss_O
        tensors[f"{name}.deviations"] = sensitivity.deviations_Q
        tensors[f"{name}.power"] = torch.tensor(sensitivity.power, dtype=torch.float64)
    return tensors


def type_rounding(
    stored: TypeFormat,
    job: PruningJob,
    session: Session,
    ids: Tensor,
    output: PruningOutput,
    record: CompressionRecord,
) -> TypeRounding:
    """The rounding to the types of least loss, which the record and the format take note of.

    The arguments are those of `rate_rounding`. What lies outside the blocks is written here,
    because it needs the types too.
    """
    ranks = session.ranks
    tensors = ranks.tensors_from_rank_0(
        lambda: output.measured(lambda: _type_losses(stored, job, session, ids, record.measured))
    )
    stored.types = stored.types_of(_named(tensors, _LOSSES))
    stored.importances = _named(tensors, _IMPORTANCES)
    record.types = stored.types
    ranks.on_rank_0(lambda: output.write_outside({}))
    if said := stored.chosen(record):
        session.tell(said)
    return TypeRounding({name: stored.quantizer(name) for name in job.selected_linears()})


def _named(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors of one kind, by module, from those of `_type_losses`."""
    return {key.removeprefix(kind): x for key, x in tensors.items() if key.startswith(kind)}


class TypeRounding:
    """Rounds each linear by its quantiser; see `LinearFinish` in `engine/block/linear.py`.

    Args:
        quantizers: Full name of a linear -> the quantiser of its type.
    """

    def __init__(self, quantizers: Mapping[str, GroupQuantizer]) -> None:
        self._quantizers = quantizers

    def begin(self, name: str, statistics: InputStatistics) -> GroupQuantizer:
        """The quantiser of the linear of this full name."""
        return self._quantizers[name]

    def end(
        self, name: str, quantized: Quantized | GroupedWeight
    ) -> tuple[PackedLinear, dict[str, Any]]:
        """The weight as it was rounded, and fields of its `LinearRecord`."""
        assert isinstance(quantized, GroupedWeight)
        return quantized, {"bits": quantized.quantizer.bits}


def _type_losses(
    stored: TypeFormat,
    job: PruningJob,
    session: Session,
    ids: Tensor,
    digests: dict[str, str],
) -> dict[str, Tensor]:
    """Measure what each type of each weight adds to the loss.

    Returns:
        Named tensors, which a file can store: of the first module of each weight the loss that each
        of its types adds (types,), and of embedding and head float32 (I,), how much errors in each
        column raise the loss. The kinds are `_LOSSES` and `_IMPORTANCES`.
    """
    tensors: dict[str, Tensor] = {}
    if not stored.measures_loss:
        return tensors
    sensitivities = measure_loss(
        job, session, ids, digests, job.selected, job.work.options, quantizes=True, outside=True
    )
    modules, linears = dict(job.skeleton.model.named_modules()), job.selected_linears()
    uses: dict[int, list[LinearSensitivity]] = {}
    for name, sensitivity in sensitivities.items():
        # A tied head has another name than the embedding, and the same weight.
        uses.setdefault(id(modules[name].weight), []).append(sensitivity)
    what = "rounding some rows of each weight to every type"
    count = session.preparing(what, len(stored.shapes), job.device)
    for first in stored.shapes:
        names, quantizers = stored.stacks[first], stored.quantizers(first)
        parts = []
        for name in names:
            weight_OI = job.checkpoint.checkpoint.whole(job.stored_key(name))
            with naming(name):
                importance_I, losses = type_losses(
                    weight_OI, uses[id(modules[name].weight)], quantizers, len(names)
                )
            parts.append(losses)
        tensors[f"{_LOSSES}{first}"] = torch.stack(parts).sum(dim=0)
        if first not in linears:
            tensors[f"{_IMPORTANCES}{first}"] = importance_I
        count(1)
    return tensors


def type_losses(
    weight_OI: Tensor,
    uses: Sequence[LinearSensitivity],
    quantizers: Sequence[GroupQuantizer],
    stacked: int = 1,
) -> tuple[Tensor, Tensor]:
    """Per-column importance (I,), and the expected loss increase of each type (types,).

    The loss of an error e is half of Σ s_i E[e_i²], see `engine/loss_sensitivity.py`; the factor ½
    is the same for all types and left out.

    Args:
        weight_OI: The weight, (O, I) in any float dtype.
        uses: The sensitivity of each module with this weight: an embedding may be the head too.
        quantizers: The quantisers of the types.
        stacked: How many weights share one type. Sampled rows stand for all, in proportion to what
            errors in them cost, and there are fewer per weight where several share a type.
    """
    rows = max(_LEAST_ROWS, _ROWS // stacked)
    some_R = torch.arange(0, len(weight_OI), max(1, len(weight_OI) // rows))
    rows_RI, losses = weight_OI[some_R].float(), []
    importance_I = torch.stack([use.loss_O.sum() * use.importance_I for use in uses]).sum(dim=0)
    for quantizer in quantizers:
        rounded = round_in_groups(rows_RI, quantizer, importance_I)
        error_RI = rounded.dense().sub_(rows_RI).square_()
        parts = [error_RI @ use.importance_I @ use.loss_O[some_R] for use in uses]
        shares = [use.loss_O.sum() / use.loss_O[some_R].sum() for use in uses]
        losses.append(sum(part * share for part, share in zip(parts, shares, strict=True)))
    return importance_I, torch.tensor(losses)
