"""How each linear is rounded, from what its errors mean to the loss of the dense model.

Both ways begin with a measurement (`loss_sensitivity.py`) on rank 0, because all ranks must use the
same digits. A `RateFormat` spends its bits by a rate control. In a `TypeFormat` each weight
gets the type of least loss that the size allows.

    rate_rounding ► RateRounding     steps and bits of each linear
    type_rounding ► TypeRounding     a type for each weight; `write_lists` chooses them for others

Shape suffixes: O outputs (rows), R some of them, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.compression.rate_control import LinearRate, RateControl
from prunus.engine.block.linear import PackedLinear
from prunus.engine.linear_job import PruningJob
from prunus.engine.loss_sensitivity import (
    PROBE_TOKENS,
    PROBE_WINDOWS,
    LinearSensitivity,
    measure_loss,
)
from prunus.engine.output import PruningOutput
from prunus.engine.session import Session, shown_session
from prunus.engine.windows import calibration_windows
from prunus.formats.base import RateFormat, TypeFormat, tensors_of_kind
from prunus.formats.gguf.file import OWN_LISTS, write_importances
from prunus.formats.gguf.format import GgufFormat
from prunus.formats.records import CompressionRecord
from prunus.hardware.errors import naming
from prunus.methods.group_fits import round_in_groups
from prunus.methods.group_quantizer import GroupedWeight, GroupQuantizer
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import LinearQuantization, NearestRounding, Quantized
from prunus.model.checkpoint.atomic_files import check_file_place, make_folder, write_text
from prunus.runtime.description import QuantizedShape
from prunus.runtime.planes import encode
from prunus.runtime.weight import QuantizedWeight

# A linear is rounded again at most this many times, and each time coarser by at least this log2.
_MOST_TRIALS, _COARSER = 16, 0.002
# Rows sampled to estimate each type's loss: 64 per weight, at least 8 when several weights share a
# type.
_ROWS, _LEAST_ROWS = 64, 8
# A type that loses the share ε² of what a weight contributes raises the loss of the model by
# 1 / (1 - 8 ε²) times the sum of its independent errors, but by no more than five times. Whole
# models choose this factor, and those of one type show that there is one: relative to types of
# three bits, Q2_K and IQ2_S (ε² = 0.06) raise the loss by 1.55 times the sum, and IQ2_XXS (0.1) by
# twice the sum, in a Llama of 34 million weights.
_COHERENCE, _LEAST_REST = 8.0, 0.2
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
    sparsities = {x.name: record.allocation.get(x.name, job.recipe.sparsity) for x in linears}
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
    return {
        f"{name}.{part}": tensor
        for name, sensitivity in sensitivities.items()
        for part, tensor in (
            ("loss", sensitivity.loss_O),
            ("deviations", sensitivity.deviations_Q),
            ("power", torch.tensor(sensitivity.power, dtype=torch.float64)),
        )
    }


def type_rounding(
    stored: TypeFormat,
    job: PruningJob,
    session: Session,
    ids: Tensor,
    output: PruningOutput,
    record: CompressionRecord,
) -> TypeRounding:
    """The rounding to the types of least loss, which the record and the format take note of.

    The arguments are those of `rate_rounding`.
    """
    ranks = session.ranks
    tensors = ranks.tensors_from_rank_0(
        lambda: output.measured(
            lambda: _type_losses(stored, job, session, ids, record.measured) | stored.lasting
        )
    )
    if not stored.lasting.keys() <= tensors.keys():
        raise FileExistsError(
            f"{stored.recipe.template} is not the file that this run began with: put it back as it "
            "was, or choose `overwrite` to start again"
        )
    _take_note(stored, tensors)
    if record.types not in ({}, stored.types):
        raise FileExistsError(
            f"{stored.recipe.type or stored.recipe.fast_on} has other types than the finished "
            "blocks: the file was changed since. Put it back as it was, or choose `overwrite` to "
            "start again"
        )
    record.types = stored.types
    ranks.on_rank_0(stored.check_outside)
    if said := stored.chosen(record):
        session.tell(said)
    return TypeRounding(
        {name: stored.quantizer(name) for name in job.selected_linears()}, stored.importances
    )


def write_lists(
    job: PruningJob, types_file: Path | None, importances_file: Path | None, progress: bool
) -> list[str]:
    """Choose the types of a planned GGUF file, and write them for llama-quantize of llama.cpp.

    Args:
        job: The plan; its format holds the types afterwards.
        types_file: Where the list of types is written; None for nowhere.
        importances_file: Where the importance matrix is written; None for nowhere.
        progress: Whether to show a bar where a person looks.

    Returns:
        The names of the files.

    Raises:
        ValueError: The plan is not for a GGUF file whose weights are rounded to nearest.
        FileExistsError: Something else has the name of a file.
    """
    stored, paths = job.format, [x for x in (types_file, importances_file) if x is not None]
    if not isinstance(stored, GgufFormat) or stored.rounding == "feedback":
        raise ValueError(
            "`tensor_types` and `imatrix` are for llama-quantize, which rounds to nearest: plan a "
            "file whose name OUT ends in .gguf, and leave `rounding` feedback out"
        )
    for path in paths:
        check_file_place(path, OWN_LISTS.fullmatch)
        make_folder(path.parent)
    with shown_session("plan", progress, None) as session:
        _take_note(stored, _type_losses(stored, job, session, calibration_windows(job).ids, {}))
    if types_file is not None:
        write_text(types_file, stored.contents.type_list(stored.types))
    if importances_file is not None:
        by_tensor = {
            tensor.name: torch.stack([stored.importances[module] for module in tensor.modules])
            for tensor in stored.contents.layout.tensors
            if tensor.module in stored.importances
        }
        chunks = min(PROBE_WINDOWS, job.recipe.samples), min(PROBE_TOKENS, job.recipe.seqlen)
        text = Path(job.recipe.calibration).name
        write_importances(importances_file, by_tensor, chunks, text)
    return list(map(str, paths))


def _take_note(stored: TypeFormat, tensors: Mapping[str, Tensor]) -> None:
    """Choose the types by the tensors of `_type_losses`, and enter them into the format."""
    stored.types = stored.types_of(tensors_of_kind(tensors, _LOSSES))
    stored.importances = tensors_of_kind(tensors, _IMPORTANCES)


class TypeRounding:
    """Rounds each linear by its quantiser; see `LinearFinish` in `engine/block/linear.py`.

    Args:
        quantizers: Full name of a linear -> the quantiser of its type.
        importances: Full name of a linear -> the importance of its columns, float32 (I,). A linear
            that has one is rounded to nearest, the others with feedback.
    """

    def __init__(
        self, quantizers: Mapping[str, GroupQuantizer], importances: Mapping[str, Tensor]
    ) -> None:
        self._quantizers, self._importances = quantizers, importances

    def begin(self, name: str, statistics: InputStatistics) -> GroupQuantizer | NearestRounding:
        """How the linear of this full name is rounded."""
        quantizer, importance_I = self._quantizers[name], self._importances.get(name)
        return quantizer if importance_I is None else NearestRounding(quantizer, importance_I)

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
        column raise the loss as an embedding, in units of the mean square of an input of the head.
        Where each weight is rounded by itself, what they cost as the head is added, and all linears
        have theirs, E[x_j²]. The kinds are `_LOSSES` and `_IMPORTANCES`.
    """
    tensors: dict[str, Tensor] = {}
    if not stored.measures_loss:
        return tensors
    options, corrects = job.work.options, stored.rounding == "feedback"
    sensitivities = measure_loss(
        job, session, ids, digests, job.selected, options, quantizes=corrects, outside=True
    )
    model, linears = job.skeleton.model, job.selected_linears()
    modules, output_head = dict(model.named_modules()), model.get_output_embeddings()
    head = next(x for name, x in sensitivities.items() if modules[name] is output_head)
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
            weight_OI = job.checkpoint.weight(f"{name}.weight")
            with naming(name):
                parts.append(
                    type_losses(weight_OI, uses[id(modules[name].weight)], quantizers, len(names))
                )
            if name in linears and not corrects:
                tensors[f"{_IMPORTANCES}{name}"] = sensitivities[name].importance_I
        tensors[f"{_LOSSES}{first}"] = torch.stack(parts).sum(dim=0)
        if first not in linears:
            importance_I = torch.zeros(stored.shapes[first][-1])
            # Feedback learns what errors cost as the head from the inputs of all windows.
            for use in (
                x for x in uses[id(modules[first].weight)] if x is not head or not corrects
            ):
                importance_I += use.importance_I * (use.loss_O.mean() / head.loss_O.mean())
            tensors[f"{_IMPORTANCES}{first}"] = importance_I
        count(1)
    return tensors


def type_losses(
    weight_OI: Tensor,
    uses: Sequence[LinearSensitivity],
    quantizers: Sequence[GroupQuantizer],
    stacked: int = 1,
) -> Tensor:
    """The expected loss increase of each type (types,).

    The loss of an error e is half of Σ s_i E[e_i²], see `engine/loss_sensitivity.py`; the factor ½
    is the same for all types and left out. Coarse types lose more than this sum, because their
    errors depend on each other and on those of other linears; see `_COHERENCE`.

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

    def loss_of(error_RI: Tensor) -> Tensor:
        parts = [
            error_RI.square() @ use.importance_I @ use.loss_O[some_R]
            * (use.loss_O.sum() / use.loss_O[some_R].sum())
            for use in uses
        ]  # fmt: skip
        return torch.stack(parts).sum()

    all_lost = loss_of(rows_RI).clamp_min(1e-30)
    for quantizer in quantizers:
        rounded = round_in_groups(rows_RI, quantizer, importance_I)
        loss = loss_of(rounded.dense().sub_(rows_RI))
        losses.append(loss / (1 - _COHERENCE * loss / all_lost).clamp_min(_LEAST_REST))
    return torch.tensor(losses)
