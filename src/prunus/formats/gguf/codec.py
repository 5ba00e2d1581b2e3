"""The format of llama.cpp, Ollama and LM Studio: one file, whose weights have types.

`GgufCodec` plans which tensors get which types; `result.py` makes the file of the shards.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from prunus.formats.codec import Codec
from prunus.formats.gguf.audit import FileAudit
from prunus.formats.gguf.contents import FileContents
from prunus.formats.gguf.file import OWN_LISTS, write_importances
from prunus.formats.gguf.header import padded
from prunus.formats.gguf.import_checkpoint import unpack_gguf
from prunus.formats.gguf.layout import GgufLayout, layout_of, types_in
from prunus.formats.gguf.presets import preset_bytes
from prunus.formats.gguf.result import GgufResult, read_record
from prunus.formats.gguf.speeds import LEAST_SPEED, Q4_K_M_BITS, preset_time, speeds_of
from prunus.formats.gguf.template import layout_in
from prunus.formats.gguf.types import TYPES, type_for, type_named, types_for
from prunus.model.checkpoint.files import (
    check_file_place,
    has_content,
    make_folder,
    write_text,
)
from prunus.model.checkpoint.tensor_files import Checkpoint
from prunus.rounding.cards import CardWords
from prunus.rounding.compression_record import CompressionRecord
from prunus.rounding.group_quantizer import GroupedWeight, GroupQuantizer
from prunus.rounding.lattice import lossless_type
from prunus.rounding.loss_sensitivity import PROBE_TOKENS, PROBE_WINDOWS
from prunus.rounding.size_plan import (
    Given,
    SizePlan,
    TypedWeight,
    budget_of,
    weights_in,
)
from prunus.rounding.type_choice import Measurement, TypeChoice
from prunus.words import in_bytes

# Bits of embeddings and head -> their type.
_HEAD_TYPES: dict[int | str, str] = {4: "Q4_K", 6: "Q6_K", 8: "Q8_0"}


class GgufCodec(Codec):
    """A GGUF file, made from a checkpoint or from a GGUF file in full precision."""

    PROGRAMS: ClassVar[dict[str, str]] = {
        "llama.cpp": "llama-cli -m OUT",
        "Ollama": "ollama create NAME -f BASE.Modelfile && ollama run NAME",
        "LM Studio": "lms import OUT --copy",
    }
    UPLOADS: ClassVar[dict[str, str]] = {
        "to the hub": "hf upload NAME OUT && hf upload NAME BASE.Modelfile && "
        "hf upload NAME BASE.README.md README.md",
    }
    RESULT = GgufResult

    unpack = staticmethod(unpack_gguf)
    read_record = staticmethod(read_record)

    @staticmethod
    def audit(path: Path, reads_weights: bool = False) -> Any:
        """What any GGUF file holds, and how it was made: a `FileAudit`."""
        return FileAudit.of(path, reads_weights)

    @classmethod
    def plan(cls, given: Given) -> SizePlan:
        """All matrices of the file: a type that the recipe gives, or that of least loss.

        Raises:
            ValueError: An option is wrong, a type does not fit, experts of a block would have
                several types, or the types do not reach the bits or the size.
            NotImplementedError: The family has no known layout.
        """
        recipe, times = given.recipe, speeds_of(given.recipe.fast_on or "cpu")
        names_file = recipe.type not in (None, *TYPES) and os.path.isfile(recipe.type or "")
        if recipe.type is not None and not names_file:
            type_named(recipe.type)
        if recipe.type is not None and recipe.fast_on is not None:
            raise ValueError("`fast_on` chooses types, and `type` gives them: drop one of the two")
        lasting = Measurement()
        if recipe.template is None:
            layout = layout_of(given.source, given.skeleton)
        else:
            layout, lasting = layout_in(
                recipe.template, given.source, given.skeleton, given.earlier
            )
            sources = {name for tensor in layout.tensors for name in tensor.sources}
            limited = given.selection.limited(given.skeleton, lambda x: f"{x}.weight" in sources)
            given = replace(given, selection=limited)
        if isinstance(recipe.size, str):
            recipe = recipe.model_copy(update={"size": _size_of(recipe.size, layout)})
            given = replace(given, recipe=recipe)
        linears, contents = given.linears, FileContents(layout, len(given.linears))
        for names in (tensor.modules for tensor in layout.tensors):
            if len({name in linears for name in names}) > 1:
                raise ValueError(
                    f"a GGUF file has one type for {names[0]} and all other experts of its block, "
                    "and `ignore` matches some of them: let it match all or none"
                )
        # Without a choice by losses, the head has the type of llama.cpp's own files.
        of_head = recipe.type and ("Q8_0" if recipe.type == "Q8_0" else "Q6_K")
        if recipe.head_bits is not None:
            of_head = _HEAD_TYPES.get(recipe.head_bits)
        kinds = dict.fromkeys(linears, recipe.type) | dict.fromkeys(given.outside, of_head)
        if names_file:
            # `head_bits` decides about the others.
            needed = kinds.keys() if recipe.head_bits is None else linears.keys()
            source = given.source.checkpoint.folder
            kinds |= types_in(Path(recipe.type or ""), source, layout.tensors, needed)
        # Types in reserve decode slowly, so a choice of types that decode fast does without them.
        weights = _weights(given, layout, kinds, with_reserve=recipe.fast_on is None)
        # Those of any types will do.
        others = contents.file_bytes(dict.fromkeys(weights, "Q8_0")) - sum(
            padded(TYPES["Q8_0"].nbytes_of(math.prod(x.shape))) for x in weights.values()
        )
        exact = sum(weight.least_lossless for weight in weights.values())
        bare = FileContents(layout, None)
        room = contents.file_bytes({}) - bare.file_bytes({})
        if isinstance(recipe.size, int) and recipe.size < others + exact <= recipe.size + room:
            # Weights that lose nothing are worth more than the record.
            contents, others = bare, others - room
        budget = budget_of(recipe, weights, others)
        words = CardWords(
            "as a GGUF file for llama.cpp, Ollama and LM Studio, with {bits} bits per weight in "
            "its linears.",
            cls.PROGRAMS,
            ["gguf"],
            fields={"library_name": "gguf", "pipeline_tag": "text-generation"},
        )
        plan = GgufPlan(
            source=given.source,
            selection=given.selection,
            given=given,
            weights=weights,
            others=others,
            budget=budget,
            # The types of a file may be those of an earlier choice, and then this file gets the
            # same bytes. A type that is given needs no measurement, unless scales do.
            measures_loss=recipe.rounding == "nearest" or recipe.type is None or names_file,
            copies=2,  # the file is put together from shards that are as large
            words=words,
            configure=None,
            lasting=lasting,
            contents=contents,
            unmatched=layout.unmatched,
            speeds=times,
        )
        if recipe.fast_on is not None:
            plan = replace(plan, most_time=plan.preset_time_of_budget())
        plan.check_reach("a GGUF file")
        usual = {name: _without_reserve(weight) for name, weight in weights.items()}
        if sum(min(weight.nbytes) for weight in usual.values()) <= budget:
            plan = replace(plan, weights=usual)
        return plan

    @staticmethod
    def encode(key: str, weight: GroupedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The bytes of a weight, under its name."""
        return {key: weight.data_OB}

    @staticmethod
    def decode(
        key: str, tensors: dict[str, torch.Tensor], quantizer: GroupQuantizer
    ) -> torch.Tensor:
        """The dense weight of a linear; its bytes leave `tensors`."""
        return GroupedWeight(quantizer, tensors.pop(key)).dense()

    @classmethod
    def rescale(
        cls,
        key: str,
        tensors: dict[str, torch.Tensor],
        quantizer: GroupQuantizer,
        factor_OS: torch.Tensor,
    ) -> None:
        """Multiply d and dmin of all spans of a weight."""
        data_OB = tensors[key]
        spans = quantizer.unpack(data_OB.reshape(-1, quantizer.nbytes))
        d_N, dmin_N = (quantizer.stored(x * factor_OS.flatten()) for x in spans[:2])
        packed = quantizer.pack(spans._replace(d_N=d_N, dmin_N=dmin_N))
        tensors[key] = packed.view_as(data_OB)


def _weights(
    given: Given, layout: GgufLayout, kinds: Mapping[str, str | None], with_reserve: bool
) -> dict[str, TypedWeight]:
    """First module of each weight that has a type -> its types: all that fit, or a given one.

    Args:
        given: What is planned for.
        layout: The tensors of the file.
        kinds: Name of each module that has a type -> the type; None if its loss chooses it.
        with_reserve: Whether types count that are kept in reserve.
    """
    # The last tensor that has the weight, or a part of it.
    tensors = {x.module: x for x in layout.tensors if x.module in kinds}
    # Tensors that are parts of one weight count together; so do the rows of a 3D one.
    rows = Counter[str]()
    for tensor in layout.tensors:
        rows[tensor.module] += math.prod(tensor.shape[:-1])
    head, config = given.head_among(tensors), given.source.config.get_text_config()
    weights = {}
    for name, tensor in tensors.items():
        columns, order, kind = tensor.shape[-1], tensor.columns, kinds[name]
        every = [replace(x, columns=order) if order else x for x in TYPES.values()]
        usual = types_for(columns, with_reserve) if kind is None else [type_for(kind, columns)]
        names = {x.name for x in usual}
        # A type whose values the weight has already may be one that others are chosen before.
        of_choice = every if kind is None else [x for x in every if x.name in names]
        lossless = lossless_type(given.sample(name), of_choice)
        types = [x for x in every if x.name in names or x is lossless]
        used = getattr(config, "num_experts_per_tok", None) if len(tensor.shape) > 2 else None
        share = used / tensor.shape[0] if used else 1.0
        if name in given.outside and name != head:
            share = 0.0  # an embedding looks up one row
        count = rows[name] * columns
        sizes = [padded(x.nbytes_of(count)) for x in types]
        weights[name] = TypedWeight(
            tensor.modules, (rows[name], columns), types, sizes, count * share, lossless
        )
    return weights


def _without_reserve(weight: TypedWeight) -> TypedWeight:
    """A weight without the types in reserve, unless it has no others."""
    kept = [x for x in weight.quantizers if not TYPES[x.name].is_reserve or x is weight.lossless]
    sizes = dict(zip(weight.quantizers, weight.nbytes, strict=True))
    return replace(weight, quantizers=kept, nbytes=[sizes[x] for x in kept]) if kept else weight


def _size_of(preset: str, layout: GgufLayout) -> int:
    """The bytes of llama-quantize's file of a preset.

    Raises:
        ValueError: llama-quantize has other rules for models of this kind.
    """
    sizes = preset_bytes(layout)
    if preset not in sizes:
        raise ValueError(
            f"what {preset} takes is not known for models of this kind: give `size` in bytes, such "
            "as 900MB"
        )
    return sizes[preset]


@dataclass(frozen=True, kw_only=True)
class GgufPlan(SizePlan):
    """The plan of a GGUF file.

    Attributes:
        contents: The fields and tensors of the file.
    """

    contents: FileContents

    def preset_time_of_budget(self) -> float:
        """What llama.cpp's presets of this size take for each token, in nanoseconds."""
        # All but the head has the bits that the head leaves.
        head = self.weights.get(self.head or "")
        rows, columns = (0, 256) if head is None else head.shape
        bits = 8 * self.budget - type_for("Q6_K", columns).bits * rows * columns
        return self._preset_time(bits / (weights_in(self.weights) - rows * columns))

    def _preset_time(self, bits: float) -> float:
        """Nanoseconds that a preset takes for each token, with this many bits in its linears."""
        head = TYPES["Q6_K"].bits
        return sum(
            weight.uses
            * preset_time(self.speeds, head if name == self.head else bits, weight.shape[-1])
            for name, weight in self.weights.items()
        )

    def _speed(self, types: Mapping[str, str]) -> float:
        """How fast processors decode the file, in units of Q4_K_M's speed.

        Args:
            types: Name of a module -> its type. Without any, the speed is what a choice keeps.
        """
        took = (
            sum(self.speeds[types[name]] * x.uses for name, x in self.weights.items())
            if types
            else self.most_time
        )
        return self._preset_time(Q4_K_M_BITS) / took

    def file_bytes(self, choice: TypeChoice | None = None) -> int:
        """Bytes of the file, as planned, or with the types of a choice."""
        return self.contents.file_bytes(choice.types) if choice else super().file_bytes()

    def describe(self, choice: TypeChoice | None = None) -> dict[str, object]:
        """The size of the file, what takes it, and its speed in units of Q4_K_M's, for a plan.

        Also how large llama.cpp's presets are.
        """
        if choice is None and self.given.recipe.type:
            choice = self.choose(Measurement())
        types = choice.types if choice else {}
        parts = self.contents.bytes_by_type(types) if types else self.planned_parts()
        size = self.size(self.file_bytes(choice), parts).model_dump()
        return {
            "file": size,
            "decoding": self._speed(types),
            "lossless": self.lossless,
            "presets": preset_bytes(self.contents.layout),
        }

    def said(self, choice: TypeChoice) -> str:
        """How many bytes of the file have each type, and how fast it decodes on a processor."""
        parts = self.contents.bytes_by_type(choice.types).most_common()
        speed = self._speed(choice.types)
        # A type that was not measured counts as very slow.
        known = f"; processors decode it about {speed:.2f} times as fast as Q4_K_M"
        return (
            f"the file holds {', '.join(f'{in_bytes(n)} in {kind}' for kind, n in parts)}"
            + (known if speed > LEAST_SPEED else "")
            + ("" if self.contents.record_bytes else "; it has no room for a record")
            + ("" if self.given.recipe.fast_on else "; with `fast_on` time counts too")
        )

    def check_lists(self, paths: Sequence[Path]) -> None:
        """Check that the lists can be written, and make their folders; see `SizePlan`."""
        if self.given.recipe.rounding == "feedback":
            super().check_lists(paths)
        for path in paths:
            others = [*dict(self.given.recipe).values(), *(x for x in paths if x is not path)]
            check_file_place(path, has_content(OWN_LISTS.fullmatch), others)
            make_folder(path.parent)

    def write_lists(
        self, choice: TypeChoice, types_file: Path | None, importances_file: Path | None
    ) -> None:
        """Write a list of types and an importance matrix, as llama-quantize reads them."""
        if types_file is not None:
            write_text(types_file, self.contents.type_list(choice.types))
        if importances_file is not None:
            by_tensor = {
                tensor.name: torch.stack([choice.importances[module] for module in tensor.modules])
                for tensor in self.contents.layout.tensors
                if tensor.module in choice.importances
            }
            recipe = self.given.recipe
            chunks = min(PROBE_WINDOWS, recipe.samples), min(PROBE_TOKENS, recipe.seqlen)
            text = Path(recipe.calibration).name
            write_importances(importances_file, by_tensor, chunks, text)

    @property
    def parameters(self) -> int:
        """How many numbers the file has, but for tables of the rotary embedding."""
        tensors = self.contents.layout.tensors
        return sum(math.prod(x.shape) for x in tensors if not x.name.startswith("rope_"))

    def note_size(self, record: CompressionRecord, written: Checkpoint) -> None:
        """Enter the size of the file, and what a template and the checkpoint do not share."""
        parts = self.contents.bytes_by_type(record.types)
        record.size = self.size(self.contents.file_bytes(record.types), parts)
