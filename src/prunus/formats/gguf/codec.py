"""The format of llama.cpp, Ollama and LM Studio: one file, whose weights have types.

`GgufCodec` plans which tensors get which types; `result.py` makes the file of the shards.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from prunus.formats.codec import Codec
from prunus.formats.gguf.audit import FileAudit
from prunus.formats.gguf.contents import FileContents, contents_for
from prunus.formats.gguf.file import OWN_LISTS, write_importances
from prunus.formats.gguf.header import padded
from prunus.formats.gguf.import_checkpoint import unpack_gguf
from prunus.formats.gguf.layout import GgufTensor, layout_of, types_in
from prunus.formats.gguf.presets import preset_bytes, size_of
from prunus.formats.gguf.result import GgufResult, read_record
from prunus.formats.gguf.speeds import LEAST_SPEED, Q4_K_M_BITS, preset_time, speeds_of
from prunus.formats.gguf.template import Template
from prunus.formats.gguf.types import TYPES, type_for, types_for
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
from prunus.rounding.llama_cpp import check_type
from prunus.rounding.loss_sensitivity import PROBE_TOKENS, PROBE_WINDOWS
from prunus.rounding.size_plan import (
    PlanRequest,
    SizePlan,
    TypedWeight,
    budget_of,
    weights_in,
)
from prunus.rounding.type_choice import Measurement, TypeChoice
from prunus.words import in_bytes

# Bits of embeddings and head -> their type.
_HEAD_TYPES: dict[int | str | None, str] = {4: "Q4_K", 6: "Q6_K", 8: "Q8_0"}


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
    def plan(cls, request: PlanRequest) -> GgufPlan:
        """All matrices of the file: a type that the recipe gives, or that of least loss.

        Raises:
            ValueError: An option is wrong, a type does not fit, experts of a block would have
                several types, or the types do not reach the bits or the size.
            NotImplementedError: The family has no known layout.
        """
        recipe, source, skeleton = request.recipe, request.source, request.skeleton
        speeds = speeds_of(recipe.fast_on or "cpu")
        if recipe.type is not None:
            check_type(recipe.type)  # before a template is read, which takes long
        # The tensors of the file ...
        if recipe.template is None:
            layout, lasting = layout_of(source, skeleton), Measurement()
        else:
            template = Template(recipe.template, source, skeleton, request.earlier.placements)
            layout, lasting = template.layout, template.lasting
        modules = {name for tensor in layout.tensors for name in tensor.modules}
        request = request.limited(modules.__contains__)  # a template may lack some
        # ... the types that each may have ...
        types: dict[str, str | None] = dict.fromkeys(request.linears, recipe.type)
        # Without a choice by losses, the head has the type of llama.cpp's own files.
        usual_of_head = recipe.type and ("Q8_0" if recipe.type == "Q8_0" else "Q6_K")
        of_head = _HEAD_TYPES.get(recipe.head_bits, usual_of_head)
        types |= dict.fromkeys(request.outside, of_head)
        if recipe.types_from is not None:
            needed = types.keys() if recipe.head_bits is None else request.linears.keys()
            types |= types_in(recipe.types_from, source.checkpoint.folder, layout.tensors, needed)
        possible = _weights(request, layout.tensors, types)
        # ... and the bytes that are left for those with types.
        size = size_of(recipe.size, layout) if isinstance(recipe.size, str) else recipe.size
        contents, others = contents_for(layout, len(request.linears), possible, size)
        budget = budget_of(possible, others, size, recipe.bits)
        weights = _without_reserve(possible, budget)
        plan = GgufPlan(
            source=source,
            selection=request.selection,
            request=request,
            weights=weights,
            others=others,
            budget=budget,
            # The types of a file may be those of an earlier choice, and then this file gets the
            # same bytes. A type that is given needs no measurement, unless scales do.
            measures_loss=recipe.rounding == "nearest" or recipe.type is None,
            copies=2,  # the file is put together from shards that are as large
            words=CardWords(
                "as a GGUF file for llama.cpp, Ollama and LM Studio, with {bits} bits per weight "
                "in its linears.",
                cls.PROGRAMS,
                ["gguf"],
                fields={"library_name": "gguf", "pipeline_tag": "text-generation"},
            ),
            configure=None,
            lasting=lasting,
            contents=contents,
            unmatched=layout.unmatched,
            speeds=speeds,
        )
        plan.check_reach("a GGUF file")
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


def _weights(
    request: PlanRequest, tensors: Sequence[GgufTensor], types: Mapping[str, str | None]
) -> dict[str, TypedWeight]:
    """First module of each weight that has a type -> its types: all that fit, or a given one.

    Args:
        request: What is planned for.
        tensors: The tensors of the file.
        types: Module that has a type -> the name of the type; None if its loss chooses it.

    Raises:
        ValueError: `ignore` matches some experts of a block, and not all.
    """
    # Tensors that are parts of one weight have one type, as the rows of a 3D one have.
    parts = defaultdict[str, list[GgufTensor]](list)
    for tensor in tensors:
        if len({name in request.linears for name in tensor.modules}) > 1:
            raise ValueError(
                f"a GGUF file has one type for {tensor.module} and all other experts of its "
                "block, and `ignore` matches some of them: let it match all or none"
            )
        if tensor.module in types:
            parts[tensor.module].append(tensor)
    used = getattr(request.source.config.get_text_config(), "num_experts_per_tok", None)
    weights = {}
    for name, several in parts.items():
        shape = several[-1].shape
        # Of the numbers of a weight, the share that is multiplied for each token.
        share = used / shape[0] if used and len(shape) > 2 else 1.0
        if name in request.outside and name != request.head:
            share = 0.0  # an embedding looks up one row
        # Types in reserve decode slowly, so a choice of types that decode fast does without them.
        weights[name] = _weight(
            several, request.sample(name), types[name], request.recipe.fast_on is None, share
        )
    return weights


def _weight(
    tensors: Sequence[GgufTensor],
    rows_OI: torch.Tensor,
    given: str | None,
    with_reserve: bool,
    share: float,
) -> TypedWeight:
    """A weight with its types.

    Args:
        tensors: The tensors of the file that have it or a part of it.
        rows_OI: Some of its rows.
        given: The name of its type; None for all that fit.
        with_reserve: See `types_for`.
        share: The share of its numbers that is multiplied for each token.
    """
    columns, order = tensors[-1].shape[-1], tensors[-1].columns
    every = [replace(x, columns=order) if order else x for x in TYPES.values()]
    usual = types_for(columns, with_reserve) if given is None else [type_for(given, columns)]
    names = {x.name for x in usual}
    # A type whose values the weight has already may be one that others are chosen before.
    lossless = lossless_type(rows_OI, [x for x in every if given is None or x.name in names])
    kinds = [x for x in every if x.name in names or x is lossless]
    counts = [math.prod(x.shape) for x in tensors]
    return TypedWeight(
        tensors[-1].modules,
        (sum(counts) // columns, columns),
        kinds,
        [sum(padded(kind.nbytes_of(count)) for count in counts) for kind in kinds],
        sum(counts) * share,
        lossless,
    )


def _without_reserve(weights: Mapping[str, TypedWeight], budget: int) -> Mapping[str, TypedWeight]:
    """The weights without types in reserve, if all fit into `budget` so.

    A weight that has no other types keeps them, and so does one that has the values of its type.
    """
    usual = {}
    for name, weight in weights.items():
        sizes = [
            (kind, nbytes)
            for kind, nbytes in zip(weight.quantizers, weight.nbytes, strict=True)
            if not TYPES[kind.name].is_reserve or kind is weight.lossless
        ]
        kinds, nbytes = zip(*sizes, strict=True) if sizes else (weight.quantizers, weight.nbytes)
        usual[name] = replace(weight, quantizers=kinds, nbytes=nbytes)
    return usual if sum(min(x.nbytes) for x in usual.values()) <= budget else weights


@dataclass(frozen=True, kw_only=True)
class GgufPlan(SizePlan):
    """The plan of a GGUF file.

    Attributes:
        contents: The fields and tensors of the file.
    """

    contents: FileContents

    @functools.cached_property
    def most_time(self) -> float:
        """With `fast_on`, the time of llama.cpp's presets of this size; see `SizePlan`."""
        if self.request.recipe.fast_on is None:
            return math.inf
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
        if choice is None and self.request.recipe.gives_types:
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
            + ("" if self.request.recipe.fast_on else "; with `fast_on` time counts too")
        )

    def check_lists(self, paths: Sequence[Path]) -> None:
        """Check that the lists can be written, and make their folders; see `SizePlan`."""
        if self.request.recipe.rounding == "feedback":
            super().check_lists(paths)
        for path in paths:
            others = [*dict(self.request.recipe).values(), *(x for x in paths if x is not path)]
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
            recipe = self.request.recipe
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
