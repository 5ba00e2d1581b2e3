"""How each linear is rounded, from what its errors mean to the loss of the dense model.

It begins with a measurement (`loss_sensitivity.py`) on rank 0, because all ranks must use the same
digits. Then each weight gets the type of least loss that the size allows.

    type_rounding    a type for each weight; `write_lists` chooses them for other programs

Shape suffixes: O outputs (rows), R some of them, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prunus.engine.block.linear import LinearRounding
from prunus.engine.linear_job import PruningJob
from prunus.engine.loss_sensitivity import (
    PROBE_TOKENS,
    PROBE_WINDOWS,
    LinearSensitivity,
    Measurement,
    measure_loss,
)
from prunus.engine.output import PruningOutput
from prunus.engine.session import Session, shown_session
from prunus.engine.windows import calibration_windows
from prunus.formats.base import CompressedFormat, tensors_of_kind
from prunus.formats.gguf.file import OWN_LISTS, write_importances
from prunus.formats.gguf.format import GgufFormat
from prunus.formats.records import CompressionRecord
from prunus.hardware.errors import naming
from prunus.methods.group_fits import round_in_groups
from prunus.methods.group_quantizer import GroupQuantizer
from prunus.methods.work import NearestRounding
from prunus.model.checkpoint.atomic_files import check_file_place, make_folder, write_text

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


def type_rounding(
    stored: CompressedFormat,
    job: PruningJob,
    session: Session,
    ids: Tensor,
    output: PruningOutput,
    record: CompressionRecord,
) -> LinearRounding:
    """The rounding to the types of least loss, which the record and the format take note of.

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
    if said := stored.chosen():
        session.tell(said)

    def round_as(name: str) -> GroupQuantizer | NearestRounding:
        """A linear with an importance is rounded to nearest, the others with feedback."""
        quantizer, importance_I = stored.quantizer(name), stored.importances.get(name)
        return quantizer if importance_I is None else NearestRounding(quantizer, importance_I)

    return round_as


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


def _take_note(stored: CompressedFormat, tensors: Mapping[str, Tensor]) -> None:
    """Choose the types by the tensors of `_type_losses`, and enter them into the format."""
    stored.types = stored.types_of(tensors_of_kind(tensors, _LOSSES))
    stored.importances = tensors_of_kind(tensors, _IMPORTANCES)


def _type_losses(
    stored: CompressedFormat,
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
    corrects = stored.rounding == "feedback"
    sensitivities = measure_loss(
        job,
        session,
        ids,
        digests,
        Measurement(
            job.selected,
            job.work.options.damping,
            job.recipe.seed,
            quantizes=corrects,
            outside=True,
        ),
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
