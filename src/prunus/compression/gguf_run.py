"""Compress to a GGUF file: a run of compress with types of llama.cpp for entropy codes."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from prunus.compression.gguf_output import FILE, GgufFolder, GgufPlan, finished_file
from prunus.compression.job import CompressionJob
from prunus.compression.records import CompressionRecipe, CompressionRecord
from prunus.compression.type_choice import Choice, GroupVerb, choose_types, type_losses
from prunus.formats.gguf.types import TYPES, type_for, types_for
from prunus.hardware.errors import naming
from prunus.hardware.sizes import in_bytes
from prunus.model.checkpoint.atomic_files import check_place
from prunus.model.checkpoint.gguf import open_gguf
from prunus.model.checkpoint.gguf_file import check_extra, padded
from prunus.model.checkpoint.gguf_layout import layout_of
from prunus.model.checkpoint.output_folder import check_apart
from prunus.model.checkpoint.resolve import FULL_TYPES, is_gguf
from prunus.pruning.job import PruningJob
from prunus.pruning.loss_sensitivity import LinearSensitivity, measure_loss
from prunus.pruning.manifest import PruningRecord
from prunus.pruning.output import PruningOutput
from prunus.pruning.run import carry_out_held, planned
from prunus.runs.folder import find_earlier, held, remove_result
from prunus.runs.options import RunOptions

# Bits of embeddings and head -> their type.
_HEAD_TYPES = {4: "Q4_K", 6: "Q6_K", 8: "Q8_0"}


def run_gguf(
    model: str | Path, output: Path, recipe: CompressionRecipe, options: RunOptions
) -> CompressionRecord:
    """Compress a checkpoint, or a GGUF file in full precision, to the GGUF file `output`."""
    folder, kind = _folder(model, output, recipe), CompressionRecord
    with options.with_ranks() as joint:
        ranks = joint.processes

        def find() -> CompressionRecord | None:
            return _find_earlier(model, output, folder, recipe, joint)

        with held(kind, folder, ranks, find) as earlier:
            # A record in a finished file names no shards: nothing is left to do.
            if earlier is None or earlier.state == "running" or earlier.sha256:
                earlier = cast(
                    CompressionRecord,
                    carry_out_held(model, folder, recipe, joint, GgufVerb(output), earlier),
                )
            ranks.on_rank_0(lambda: remove_result(folder, kind.FILE))
            return earlier


def plan_gguf(
    model: str | Path, output: Path, recipe: CompressionRecipe, options: RunOptions
) -> PruningJob:
    """The job of such a run; checks what the run checks, and writes nothing."""
    folder = _folder(model, output, recipe)
    _find_earlier(model, output, folder, recipe, options)
    return planned(model, folder, recipe, options, GgufJob)


def _folder(model: str | Path, output: Path, recipe: CompressionRecipe) -> Path:
    """The folder of the run that makes a file. Refuses a GGUF file that was rounded already."""
    if recipe.format != "packed":
        raise ValueError(
            f"{recipe.format} is the format of a folder: give the output a name that does not end "
            "in .gguf, or leave `format` out"
        )
    check_extra()
    given = is_gguf(model) and Path(model).is_file()
    if given and (few := open_gguf(Path(model)).types.keys() - FULL_TYPES):
        raise ValueError(
            f"{model} has weights in {', '.join(sorted(few))}, which were rounded already. Give a "
            "file in F32, F16, BF16 or Q8_0, or the checkpoint that it was made from"
        )
    folder = output.with_name(f"{output.name}.part")
    check_place(folder)
    check_apart(output, Path(model))
    if output.is_dir() or folder.is_symlink():
        wrong = f"{output} is a folder" if output.is_dir() else f"{folder} is a link"
        raise FileExistsError(f"{wrong}: move it away, or choose another name for the file")
    return folder


def _find_earlier(
    model: str | Path, output: Path, folder: Path, recipe: CompressionRecipe, options: RunOptions
) -> CompressionRecord | None:
    """The record of the run to go on with, or else that of a finished file; None for neither."""
    done = None if options.overwrite else finished_file(output, recipe)
    earlier = find_earlier(CompressionRecord, folder, recipe, options, Path(model))
    # A kill may come between the name of the file and the end of its folder.
    is_over = earlier is None or (earlier.state == "finished" and not (folder / FILE).exists())
    return done if done is not None and is_over else earlier


@dataclass(kw_only=True)
class GgufJob(CompressionJob):
    """The decisions of one run that makes a GGUF file."""

    def check(self) -> None:
        self.refuse_zeros("a GGUF file")
        linears = self.selected_linears()
        for names in self.stacks.values():
            if len({name in linears for name in names}) > 1:
                raise ValueError(
                    f"a GGUF file has one type for {names[0]} and all other experts of its block, "
                    "and `ignore` matches some of them: let it match all or none"
                )
        reach = self._reach
        if not reach[0] <= self._budget <= reach[1]:
            bits = " to ".join(f"{8 * each / self._weights:.2f}" for each in reach)
            sizes = " to ".join(in_bytes(each + self._others) for each in reach)
            raise ValueError(
                f"{self.recipe.target} is not possible in a GGUF file of this model: its types "
                f"take {bits} bits per weight, with embeddings and head, and such files {sizes}"
            )

    @functools.cached_property
    def plan(self) -> GgufPlan:
        """The fields and tensors of the file."""
        source, stored, kept = self.checkpoint, self.checkpoint.stored, dict[int, str]()
        for name, tensor in self.skeleton.model.state_dict(keep_vars=True).items():
            if name in stored:
                kept.setdefault(id(tensor), name)  # a tied head is not stored again
        infos = {name: source.checkpoint.tensors[stored[name]] for name in kept.values()}
        shapes = {name: info.shape for name, info in infos.items()}
        folder, template = source.checkpoint.folder, self.recipe.template
        layout = layout_of(folder, source.config, shapes, template)
        dtypes = {name: info.dtype for name, info in infos.items()}
        return GgufPlan(layout, dtypes, len(self.selected_linears()))

    def choices(self, losses: Mapping[str, torch.Tensor]) -> dict[str, list[Choice]]:
        """First module of a tensor -> the types that it can have, and their losses."""
        recipe, linears, stored = self.recipe, self.selected_linears(), self.checkpoint.stored
        head_type = _HEAD_TYPES.get(recipe.packs_head or 0)
        if "head_bits" not in recipe.model_fields_set:
            # Where types are not chosen by their losses, it is that of llama.cpp's own files.
            head_type = recipe.type and ("Q8_0" if recipe.type == "Q8_0" else "Q6_K")
        found = {}
        for tensor in self.plan.layout.tensors:
            is_outside = stored.get(f"{tensor.module}.weight") in self.packed_outside
            if tensor.module in linears or is_outside:
                kind, columns = head_type if is_outside else recipe.type, tensor.shape[-1]
                types = types_for(columns) if kind is None else [type_for(kind, columns)]
                known = losses.get(tensor.module, torch.zeros(len(types))).tolist()
                found[tensor.module] = [
                    Choice(x.name, padded(x.nbytes_of(math.prod(tensor.shape))), loss)
                    for x, loss in zip(types, known, strict=True)
                ]
        return found

    def types_for(self, losses: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """The type of each linear, embedding and head, by the losses that its choices add."""
        chosen = choose_types(self.choices(losses), self._budget)
        return {name: kind for first, kind in chosen.items() for name in self.stacks[first]}

    @functools.cached_property
    def stacks(self) -> dict[str, list[str]]:
        """First module of each tensor of the file -> all of its modules, which have one type."""
        return {tensor.module: tensor.modules for tensor in self.plan.layout.tensors}

    @functools.cached_property
    def _reach(self) -> tuple[int, int]:
        """The bytes of all weights with a type, each with its smallest and its largest one."""
        sizes = [[x.nbytes for x in each] for each in self.choices({}).values()]
        return sum(map(min, sizes)), sum(map(max, sizes))

    @functools.cached_property
    def _others(self) -> int:
        """The bytes of the file that do not depend on the types."""
        return self.plan.file_bytes(choose_types(self.choices({}), 0)) - self._reach[0]

    @property
    def _weights(self) -> int:
        """How many weights have a type."""
        names = self.choices({})
        return sum(math.prod(x.shape) for x in self.plan.layout.tensors if x.module in names)

    @property
    def _budget(self) -> int:
        """The bytes of all weights with a type."""
        if self.recipe.size is not None:
            return self.recipe.size - self._others
        if self.recipe.bits is not None:
            return int(self.recipe.bits * self._weights / 8)
        return self._reach[0]

    def describe(self) -> dict[str, object]:
        if self.measures_loss:
            kinds = {choice.kind: None for each in self.choices({}).values() for choice in each}
            mix = f"the best mix of {', '.join(kinds)}"
            parts = Counter({mix: self._budget, "all else": self._others})
        else:
            parts = self.plan.bytes_by_type(self.types_for({}))
        before = self.checkpoint.checkpoint.file_bytes()
        return {"file": self.plan.size(before, self.file_bytes(), parts).model_dump()}

    def file_bytes(self) -> int:
        return self._others + self._budget

    def disk_bytes(self) -> int:
        # The file is put together from shards that are as large.
        return super().disk_bytes() + self.file_bytes()

    @property
    def measures_loss(self) -> bool:
        return self.recipe.type is None


class GgufVerb(GroupVerb):
    """Compress into the types of GGUF; `path` is that of the file."""

    job = GgufJob

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def output(self, folder: Path | None, record: PruningRecord, job: PruningJob) -> PruningOutput:
        assert folder and isinstance(record, CompressionRecord) and isinstance(job, GgufJob)
        return GgufFolder(folder, record, job, self._path, job.plan)

    def finish_linear(
        self, job: PruningJob, ids: torch.Tensor, output: PruningOutput, record: PruningRecord
    ) -> GgufVerb:
        assert isinstance(job, GgufJob) and isinstance(record, CompressionRecord)
        assert isinstance(output, GgufFolder)
        losses = job.ranks.tensors_from_rank_0(lambda: output.measured(lambda: _measure(job, ids)))
        record.types = job.types_for(losses)
        self.quantizers = {name: TYPES[kind] for name, kind in record.types.items()}
        parts = job.plan.bytes_by_type(record.types).most_common()
        job.ranks.on_rank_0(output.finish_outside)
        words = [f"{in_bytes(nbytes)} in {kind}" for kind, nbytes in parts]
        job.options.tell(f"the file holds {', '.join(words)}")
        return self


def _measure(job: GgufJob, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name -> the losses that its choices add; NAME.importance for embedding and head."""
    if not job.measures_loss:
        return {}
    options, checkpoint = job.linear_settings.work.options, job.checkpoint
    known = measure_loss(job, ids, job.selected, options, quantizes=True, outside=True)
    modules, found = dict(job.skeleton.model.named_modules()), dict[str, torch.Tensor]()
    uses: dict[int, list[LinearSensitivity]] = {}
    for name, use in known.items():
        # A tied head has another name than the embedding, and the same weight.
        uses.setdefault(id(modules[name].weight), []).append(use)
    every = job.choices({})
    count = job.preparing("rounding some rows of each weight to every type", len(every))
    for first, choices in every.items():
        kinds, names, parts = [choice.kind for choice in choices], job.stacks[first], []
        for name in names:
            weight_OI = checkpoint.checkpoint.whole(checkpoint.stored[f"{name}.weight"])
            of_weight = uses[id(modules[name].weight)]
            with naming(name):
                importance_I, losses = type_losses(weight_OI, of_weight, kinds, len(names))
            parts.append(losses)
        found[first] = torch.stack(parts).sum(dim=0)
        if first not in job.selected_linears():
            found[f"{first}.importance"] = importance_I
        count(1)
    return found
