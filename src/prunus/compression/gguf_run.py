"""Compress to a GGUF file: a run of compress with types of llama.cpp for entropy codes."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from prunus.compression.file_size import embedding_and_head
from prunus.compression.gguf_output import GgufFolder, GgufPlan, read_record
from prunus.compression.job import CompressionJob
from prunus.compression.records import CompressionRecipe, CompressionRecord
from prunus.methods.grids import GRIDS, GridWeight, grid_for
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import GridQuantization, Quantized
from prunus.model.checkpoint.gguf import check_header
from prunus.model.checkpoint.gguf_file import GgufFile, check_extra
from prunus.model.checkpoint.gguf_layout import layout_of
from prunus.model.checkpoint.resolve import FULL_TYPES, is_gguf
from prunus.pruning.block.linear import Stored
from prunus.pruning.job import PruningJob, plan_run
from prunus.pruning.manifest import PruningRecord
from prunus.pruning.output import PruningOutput
from prunus.pruning.run import PruneVerb, carry_out
from prunus.runs.folder import find_earlier
from prunus.runs.options import RunOptions
from prunus.runs.plan import check_room

# Bits of embeddings and head -> their type.
_HEAD_TYPES = {4: "Q4_K", 6: "Q6_K", 8: "Q8_0"}


def run_gguf(
    model: str | Path, output: Path, recipe: CompressionRecipe, options: RunOptions
) -> CompressionRecord:
    """Compress a checkpoint, or a GGUF file in full precision, to the GGUF file `output`."""
    _check_model(model)
    folder = _folder(output)
    if options.overwrite or (done := _finished(output, recipe)) is None:
        done = cast(CompressionRecord, carry_out(model, folder, recipe, options, GgufVerb(output)))
    options.processes.on_rank_0(lambda: shutil.rmtree(folder, ignore_errors=True))
    return done


def plan_gguf(
    model: str | Path, output: Path, recipe: CompressionRecipe, options: RunOptions
) -> PruningJob:
    """The job of such a run; checks what the run checks, and writes nothing."""
    _check_model(model)
    folder = _folder(output)
    if not options.overwrite:
        _finished(output, recipe)
    find_earlier(CompressionRecord, folder, recipe, options, Path(model))
    job = plan_run(model, recipe, options, GgufJob)
    check_room(job, folder)
    return job


def _folder(output: Path) -> Path:
    """The folder of the run that makes a file."""
    return output.with_name(f"{output.name}.part")


def _check_model(model: str | Path) -> None:
    """Refuse a GGUF file whose weights were rounded already."""
    check_extra()
    if not is_gguf(model) or not Path(model).is_file():
        return
    check_header(Path(model))
    if few := GgufFile.open(Path(model)).types - FULL_TYPES:
        raise ValueError(
            f"{model} has weights in {', '.join(sorted(few))}, which were rounded already. Give a "
            "file in F32, F16, BF16 or Q8_0, or the checkpoint that it was made from"
        )


def _finished(output: Path, recipe: CompressionRecipe) -> CompressionRecord | None:
    """The record of a file that an earlier run of the same recipe made; None without a file."""
    if not output.exists():
        return None
    earlier = read_record(output) if output.is_file() else None
    if earlier is None:
        raise FileExistsError(
            f"output {output} exists and is not a file that prunus compress made; it is left as it "
            "is. Choose another name"
        )
    earlier.check_same_run(recipe)
    return earlier


@dataclass(kw_only=True)
class GgufJob(CompressionJob):
    """The decisions of one run that makes a GGUF file."""

    def check(self) -> None:
        if self.recipe.forces_zeros:
            raise ValueError(
                "a GGUF file stores zeros as all other weights: leave `sparsity` and `pattern` "
                "out, or write a packed checkpoint, whose zeros take fewer bits"
            )
        if self.recipe.type is None:
            raise ValueError("a GGUF file needs the `type` of its linears, such as Q4_K")
        self.file_bytes()

    @functools.cached_property
    def plan(self) -> GgufPlan:
        """The fields and tensors of the file."""
        source, stored, kept = self.checkpoint, self.checkpoint.stored, dict[int, str]()
        for name, tensor in self.skeleton.model.state_dict(keep_vars=True).items():
            if name in stored:
                kept.setdefault(id(tensor), name)  # a tied head is not stored again
        infos = {name: source.checkpoint.tensors[stored[name]] for name in kept.values()}
        shapes = {name: info.shape for name, info in infos.items()}
        layout = layout_of(source.checkpoint.folder, source.config, shapes)
        dtypes = {name: info.dtype for name, info in infos.items()}
        return GgufPlan(layout, dtypes, len(self.selected_linears()))

    @functools.cached_property
    def types(self) -> dict[str, str]:
        """The type of each linear, embedding and head."""
        recipe, linears, stored = self.recipe, self.selected_linears(), self.checkpoint.stored
        head_type = _HEAD_TYPES.get(recipe.packs_head or 0)
        if "head_bits" not in recipe.model_fields_set:
            head_type = "Q8_0" if recipe.type == "Q8_0" else "Q6_K"  # as in llama.cpp's own files
        outside, found = embedding_and_head(self.skeleton.model, stored), {}
        for tensor in self.plan.layout.tensors:
            name = (tensor.source or "").removesuffix(".weight")
            head = head_type if stored.get(tensor.source or "") in outside else None
            if (kind := recipe.type if name in linears else head) is not None:
                found[name] = grid_for(kind, tensor.shape[-1]).name
        return found

    def describe(self) -> dict[str, object]:
        file = self.plan.size(self.types, self.checkpoint.checkpoint.file_bytes())
        return {"types": self.recipe.type, "file": file.model_dump()}

    def file_bytes(self) -> int:
        return self.plan.file_bytes(self.types)

    def disk_bytes(self) -> int:
        # The file is put together from shards that are as large.
        return super().disk_bytes() + self.file_bytes()

    @property
    def measures_loss(self) -> bool:
        return False


class GgufVerb(PruneVerb):
    """Compress into the types of GGUF; `path` is that of the file."""

    job = GgufJob

    def __init__(self, path: Path) -> None:
        self._path = path

    def output(self, folder: Path | None, record: PruningRecord, job: PruningJob) -> PruningOutput:
        assert folder and isinstance(record, CompressionRecord) and isinstance(job, GgufJob)
        return GgufFolder(folder, record, job, self._path, job.plan)

    def finish_linear(
        self, job: PruningJob, ids: torch.Tensor, output: PruningOutput, record: PruningRecord
    ) -> GridRounding:
        assert isinstance(job, GgufJob) and isinstance(record, CompressionRecord)
        record.types = job.types
        return GridRounding(record.types)


class GridRounding:
    """Rounds linears to the values of their types; see `prunus.pruning.block.linear`."""

    def __init__(self, types: Mapping[str, str]) -> None:
        self._types = types

    def begin(self, name: str, statistics: InputStatistics) -> GridQuantization:
        return GridQuantization(GRIDS[self._types[name]])

    def end(self, name: str, quantized: Quantized | GridWeight) -> tuple[Stored, dict[str, Any]]:
        assert isinstance(quantized, GridWeight)
        return quantized, {"bits": quantized.grid.bits}
