"""Which weights of a result have types, and how large it becomes: what a run of compress plans.

    PlanRequest          the model, its linears and the recipe: what a codec is asked about
    TypedWeight    a weight with the types that it can have
    SizePlan       all of them, the bytes that they may take, and so the choice of types
    folder_plan    the plan of a result that is a folder
    size_plan_of   the plan of the result of a run

Embedding and head can have types too; they lie outside the blocks.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.engine.linear_plan import LinearPlan, LinearSelection, Storage
from prunus.methods.statistics import FIRST_SHARE
from prunus.model.checkpoint.tensor_files import Checkpoint, file_nbytes
from prunus.model.linears import Linear
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.rounding.cards import CardWords, quantized_card
from prunus.rounding.compression_recipe import CompressionRecipe
from prunus.rounding.compression_record import CompressionRecord, FileSize
from prunus.rounding.group_quantizer import GroupedWeight, GroupQuantizer
from prunus.rounding.lattice import lossless_type
from prunus.rounding.type_choice import Choice, Measurement, TypeChoice, choose_types
from prunus.words import in_bytes

# The first rows of a weight that are read before a run, and as many of the last ones.
_SAMPLED = 8


@dataclass(frozen=True)
class PlanRequest:
    """What a codec is asked to plan for.

    Attributes:
        recipe: The recipe of the run.
        source: The checkpoint.
        skeleton: Its model.
        selection: The linears that are compressed.
        earlier: What an unfinished run has measured; empty for a new one.
    """

    recipe: CompressionRecipe
    source: CheckpointSource
    skeleton: Skeleton
    selection: LinearSelection
    earlier: Measurement = field(default_factory=Measurement)

    @functools.cached_property
    def linears(self) -> dict[str, Linear]:
        """Full name -> linear that is compressed."""
        return self.selection.linears(self.skeleton)

    @functools.cached_property
    def outside(self) -> dict[str, list[str]]:
        """See `VocabularyWeights.roundable`. Empty if `head_bits` is none."""
        if self.recipe.head_bits == "none":
            return {}
        return self.skeleton.vocabulary_weights.roundable(self.source.stored_names)

    def limited(self, keeps: Callable[[str], bool]) -> PlanRequest:
        """The same without the linears for whose full name `keeps` is False."""
        return replace(self, selection=self.selection.limited(self.skeleton, keeps))

    @functools.cached_property
    def head(self) -> str | None:
        """The one of `outside` that has the weight of the output head; None for none.

        It is the embedding where both are tied.
        """
        owner = self.skeleton.vocabulary_weights.of_logits
        return owner.name if owner is not None and owner.name in self.outside else None

    def scale_dtype(self, name: str) -> torch.dtype:
        """The dtype of the scales of a module: bfloat16, or float16 where that is its own."""
        # What is stored in float32 is run in bfloat16 or float16, and nearly all scales that are
        # exact in bfloat16 are exact in both.
        stored = self.source.weight_dtype(name)
        return torch.float16 if stored == torch.float16 else torch.bfloat16

    def sample(self, name: str) -> torch.Tensor:
        """The first and the last rows of a weight, to see whether they lie on a lattice.

        The first expert stands for all that are stored in one tensor.
        """
        checkpoint, key = self.source.checkpoint, self.source.weight_key(name)
        if (piece := self.source.pieces.get(key)) is not None:
            first = checkpoint.first_matrix(piece.key)
            rows_OI = piece.fused.cut(first.expand(piece.fused.shape[0], *first.shape))[piece.name]
            return torch.cat([rows_OI[:_SAMPLED], rows_OI[-_SAMPLED:]])
        info = checkpoint.tensors[key]
        most = _SAMPLED * info.shape[-1] * info.dtype.itemsize
        starts = sorted({0, max(0, info.nbytes - most)})
        rows = [next(checkpoint.pieces(key, most, start)) for start in starts]
        return torch.cat(rows).view(-1, info.shape[-1])

    def check_widths(self, names: Sequence[str], group: int) -> None:
        """Check that some weights consist of whole groups.

        Args:
            names: Their modules.
            group: The number of columns of the smallest group.

        Raises:
            ValueError: A weight does not; names it.
        """
        for name in names:
            columns = self.source.checkpoint.tensors[self.source.weight_key(name)].shape[-1]
            if columns % group:
                raise ValueError(
                    f"{name} has {columns} inputs, and groups need a number that {group} "
                    "divides: keep it as it is with `ignore`, or embeddings and head with "
                    "`head_bits` none"
                )

    def refuse_gguf_options(self, takes_nearest: bool = False, types: Collection[str] = ()) -> None:
        """Refuse the options of GGUF files.

        Args:
            takes_nearest: Whether the format can round each weight by itself too.

        Raises:
            ValueError: The recipe has one of them.
        """
        recipe, nearest = self.recipe, self.recipe.rounding == "nearest" and not takes_nearest
        of_gguf = recipe.type not in (None, *types) or isinstance(recipe.size, str)
        of_gguf = of_gguf or bool(recipe.template or recipe.fast_on or recipe.types_from)
        if of_gguf or nearest:
            raise ValueError(
                "`type`, `types_from`, `template`, `fast_on`, `rounding` nearest, sizes of "
                "llama.cpp's presets and lists for llama-quantize belong to GGUF files: give the "
                "output a name that ends in .gguf, or leave them out. `rounding` nearest, and "
                "`type` NVFP4 or MXFP4, are for compressed-tensors too"
            )

    def typed(
        self, names: Sequence[str], quantizers: Sequence[GroupQuantizer], beyond: int = 0
    ) -> TypedWeight:
        """The weight of modules that have a type together, one of `quantizers`.

        Args:
            names: The modules.
            quantizers: The types.
            beyond: How many more bytes than in its type a span takes in the result.
        """
        tensors = self.source.checkpoint.tensors
        shapes = [tuple(tensors[self.source.weight_key(name)].shape) for name in names]
        count = sum(map(math.prod, shapes))
        sizes = [kind.nbytes_of(count) + count // kind.span * beyond for kind in quantizers]
        shape = shapes[0] if len(shapes) == 1 else (count,)
        kept, *others = [lossless_type(self.sample(name), quantizers) for name in names]
        lossless = kept if all(kind is kept for kind in others) else None
        return TypedWeight(names, shape, quantizers, sizes, lossless=lossless)

    def shards(
        self, weights: Mapping[str, TypedWeight], encode: Encode, left_out: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """Each shard of a folder: name -> something with a shape and a dtype.

        What lies outside the blocks is first, then each block follows.

        Each weight has the last of its types.

        Args:
            weights: Module -> weight that has a type of its own.
            encode: `Codec.encode`.
            left_out: See `SizePlan`.
        """
        source = self.source
        kinds = {
            source.weight_key(name): weight.quantizers[-1]
            for weight in weights.values()
            for name in weight.modules
        }
        copies = {x for name, keys in self.outside.items() if name in weights for x in keys[1:]}
        copies.update(left_out)
        outside = [key for key in source.outside_keys() if key not in copies]
        blocks = map(source.block_keys, range(len(self.skeleton)))
        shards: list[dict[str, Any]] = []
        for keys in (outside, *blocks):
            shards.append({})
            for key in keys:
                info = source.checkpoint.tensors[key]
                if (kind := kinds.get(key)) is None:
                    shards[-1][key] = info
                    continue
                size = info.shape[0], kind.nbytes_of(info.shape[1])
                data_OB = torch.empty(size, dtype=torch.uint8, device="meta")
                shards[-1] |= encode(key, GroupedWeight(kind, data_OB), info.dtype)
        return shards


#: `Codec.encode`.
Encode = Callable[[str, GroupedWeight, torch.dtype], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class TypedWeight:
    """A weight with the types that it can have.

    Attributes:
        modules: The names of the modules that have it or a part of it: all experts of a block have
            one tensor in a GGUF file, and vLLM joins query, key and value.
        shape: Rows of all modules together, and columns last; of several with a tensor each the
            number of all weights alone.
        quantizers: The types.
        nbytes: The bytes of the weight in each of them.
        lossless: The smallest of the types whose values the weight has already, as far as a few
            rows say; None for none.
        uses: How many of its numbers are multiplied for each token; 0 if that does not matter.
    """

    modules: Sequence[str]
    shape: tuple[int, ...]
    quantizers: Sequence[GroupQuantizer]
    nbytes: Sequence[int]
    uses: float = 0.0
    lossless: GroupQuantizer | None = None

    @property
    def least_lossless(self) -> float:
        """The bytes of the smallest type that loses nothing; infinite without one."""
        kind = self.lossless
        return math.inf if kind is None else self.nbytes[self.quantizers.index(kind)]


@dataclass(frozen=True, kw_only=True)
class SizePlan(Storage):
    """The plan of a result whose weights have types.

    Attributes:
        request: What it was made for.
        weights: First module of each weight that has a type -> the weight.
        others: The bytes of all that has no type, whatever the types are.
        budget: The most bytes of all weights that have a type.
        words: What the model card says of the format.
        configure: From the plan and the record to the content of config.json; None for none.
        speeds: Type -> nanoseconds per weight; empty if time does not matter.
        left_out: Names of matrices of the checkpoint that the result lacks, because no program
            reads them from it.
        lasting: What is known of the measurement before the run, which lasts with it.
        tensors: Stored name -> something with a shape and a dtype, of all tensors of the result;
            None if the choice of types decides it.
        by_inputs: See `LossMeasurement`.
    """

    request: PlanRequest
    weights: Mapping[str, TypedWeight]
    others: int
    budget: int
    words: CardWords
    configure: Callable[[SizePlan, Mapping[str, GroupQuantizer]], Mapping[str, object]] | None
    speeds: Mapping[str, float] = field(default_factory=dict)
    left_out: Collection[str] = ()
    lasting: Measurement = field(default_factory=Measurement)
    tensors: Mapping[str, Any] | None = None
    by_inputs: bool = False

    def check_reach(self, result: str) -> None:
        """Check that the types reach the bits or the size that the recipe asks for.

        Args:
            result: What people call the result, such as "a GGUF file".

        Raises:
            ValueError: They do not; says what is possible.
        """
        of_types = [weight.nbytes for weight in self.weights.values()]
        least, most = sum(map(min, of_types)), sum(map(max, of_types))
        if not least <= self.budget <= most:
            count = weights_in(self.weights)
            bits = " to ".join(f"{8 * nbytes / count:.2f}" for nbytes in (least, most))
            sizes = " to ".join(in_bytes(nbytes + self.others) for nbytes in (least, most))
            head = ", with embeddings and head" if self.outside else ""
            raise ValueError(
                f"{self.request.recipe.target} is not possible in {result} of this model: its "
                f"types take {bits} bits per weight{head}, and such files {sizes}"
            )

    def choose(self, measurement: Measurement) -> TypeChoice:
        """The types of least loss by a measurement."""
        choices = {}
        for first, weight in self.weights.items():
            losses = measurement.losses.get(first, torch.zeros(len(weight.quantizers)))
            options = zip(weight.quantizers, weight.nbytes, losses.tolist(), strict=True)
            choices[first] = [
                Choice(kind.name, nbytes, loss, self.speeds.get(kind.name, 0.0) * weight.uses)
                for kind, nbytes, loss in options
            ]
        chosen = choose_types(choices, self.budget, self.most_time)
        types = {
            name: x.kind for first, x in chosen.items() for name in self.weights[first].modules
        }
        return TypeChoice(self.quantizers(types), measurement.importances)

    def quantizers(self, types: Mapping[str, str]) -> dict[str, GroupQuantizer]:
        """Module -> how its weight is rounded, from the names of the types."""
        return {
            name: next(x for x in weight.quantizers if x.name == types[name])
            for weight in self.weights.values()
            for name in weight.modules
        }

    @functools.cached_property
    def most_time(self) -> float:
        """The most nanoseconds that all weights may take for each token."""
        return math.inf

    @functools.cached_property
    def head(self) -> str | None:
        """The module that has the weight of the output head, if that weight has a type."""
        return self.request.head if self.request.head in self.weights else None

    @functools.cached_property
    def outside(self) -> dict[str, list[str]]:
        """Embedding and head, as far as they have a type -> stored names of the dense weight."""
        outside = self.request.outside
        return {name: outside[name] for name in self.weights if name in outside}

    def file_bytes(self, choice: TypeChoice | None = None) -> int:
        """Bytes of the files with weights, as planned."""
        return self.others + self.budget

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        infos = self.request.source.checkpoint.tensors.values()
        return sum(math.prod(info.shape) for info in infos)

    def size(self, after: int, parts: Counter[str]) -> FileSize:
        """The size of a result of `after` bytes for people, who read what takes them."""
        return FileSize(
            before=self.request.source.checkpoint.file_bytes(),
            after=after,
            parameters=self.parameters,
            bits_per_parameter=8 * after / self.parameters,
            parts=dict(parts.most_common()),
        )

    @functools.cached_property
    def lossless(self) -> str:
        """Which linears have the values of a type already, for people; empty if none have.

        A few rows of each say so. The run looks at all of them.
        """
        linears, shares, nbytes = self.request.linears, Counter[str](), 0
        weights = {name: x for name, x in self.weights.items() if name in linears}
        for weight in weights.values():
            if weight.lossless is not None:
                shares[weight.lossless.name] += math.prod(weight.shape)
                nbytes += int(weight.least_lossless)
        parts = [
            f"{n / weights_in(weights):.0%} lie on {x}'s grid" for x, n in shares.most_common()
        ]
        return f"{', '.join(parts)}: {in_bytes(nbytes)} lose nothing" if parts else ""

    def describe(self, choice: TypeChoice | None = None) -> dict[str, object]:
        """The size of the files and what takes it, and `lossless`.

        Also the bits, if there is one number of them.
        """
        parts = (
            self.planned_parts() if self.tensors is None else parts_of(self.request, self.tensors)
        )
        weight, *_ = self.weights.values()
        return {
            "file": self.size(self.file_bytes(), parts).model_dump(),
            "lossless": self.lossless,
            **({} if self.tensors is None else {"bits": weight.quantizers[0].bits}),
        }

    def planned_parts(self) -> Counter[str]:
        """What will take the bytes of the result, before the types are chosen."""
        kinds = {x.name: None for weight in self.weights.values() for x in weight.quantizers}
        return Counter(
            {f"the best mix of {', '.join(kinds)}": self.budget, "all else": self.others}
        )

    def said(self, choice: TypeChoice) -> str:
        """What to tell people once the types are chosen; empty for nothing."""
        if self.tensors is None:
            return ""
        weight, *_ = self.weights.values()
        size = self.size(self.file_bytes(), parts_of(self.request, self.tensors))
        return size.sentences(weight.quantizers[0].bits)[0]

    def check_lists(self, paths: Sequence[Path]) -> None:
        """Check that lists for llama-quantize can be written to these files.

        Raises:
            ValueError: The plan is not for a GGUF file whose weights are rounded to nearest.
            FileExistsError: Something else has the name of a file.
        """
        raise ValueError(
            "`tensor_types` and `imatrix` are for llama-quantize, which rounds to nearest: plan a "
            "file whose name OUT ends in .gguf, and leave `rounding` feedback out"
        )

    def write_lists(
        self, choice: TypeChoice, types_file: Path | None, importances_file: Path | None
    ) -> None:
        """Write the types and the importances of a choice, for which `check_lists` had no error."""

    def card(self, record: CompressionRecord) -> str:
        """The model card of the result."""
        return quantized_card(
            record, self.words, self.request.source.checkpoint.folder, self.lossless
        )

    def config(self, record: CompressionRecord) -> Mapping[str, object] | None:
        """The content of config.json, which says how each weight is stored."""
        configure = self.configure
        return None if configure is None else configure(self, self.quantizers(record.types))

    def note_size(self, record: CompressionRecord, written: Checkpoint) -> None:
        """Enter the size of the files as written into the record."""
        record.size = self.size(written.file_bytes(), parts_of(self.request, written.tensors))


def size_plan_of(plan: LinearPlan) -> SizePlan:
    """The plan of the result of a run of compress."""
    assert isinstance(plan.storage, SizePlan), "the run rounds no weights"
    return plan.storage


def folder_plan(
    request: PlanRequest,
    weights: Sequence[TypedWeight],
    encode: Encode,
    result: str | None = None,
    **fields: Any,
) -> SizePlan:
    """The plan of a result that is a folder.

    Args:
        request: What it is made for.
        weights: The weights that have a type.
        encode: `Codec.encode`.
        result: What people call the result, such as "an MLX checkpoint", if `size` or `bits` decide
            the types by their losses; None if each weight has only one.
        **fields: Further fields of the plan.

    Raises:
        ValueError: The types do not reach the bits or the size.
    """
    by_name = {weight.modules[0]: weight for weight in weights}
    # Headers are as long as those of the largest types.
    shards = request.shards(by_name, encode, fields.get("left_out", ()))
    others = sum(map(file_nbytes, shards)) - sum(weight.nbytes[-1] for weight in weights)
    fields |= {"source": request.source, "selection": request.selection, "request": request}
    fields |= {"weights": by_name, "others": others, "first_share": FIRST_SHARE}
    if result is None:
        tensors = {key: info for shard in shards for key, info in shard.items()}
        budget = sum(weight.nbytes[0] for weight in weights)
        nearest = request.recipe.rounding == "nearest"
        return SizePlan(budget=budget, tensors=tensors, measures_loss=nearest, **fields)
    size, bits = request.recipe.size, request.recipe.bits
    assert not isinstance(size, str), "sizes of presets are for GGUF files"
    budget = budget_of(by_name, others, size, bits)
    plan = SizePlan(budget=budget, measures_loss=True, **fields)
    plan.check_reach(result)
    return plan


def budget_of(
    weights: Mapping[str, TypedWeight], others: int, size: int | None, bits: float | None
) -> int:
    """The bytes of all weights with a type: what the size or the bits leave for them.

    Args:
        weights: The weights.
        others: The bytes of all else.
        size: The most bytes of the result; None for any.
        bits: Bits per weight; None for any. Without both, each weight has its smallest type.
    """
    if size is not None:
        return size - others
    if bits is not None:
        return int(bits * weights_in(weights) / 8)
    return sum(min(weight.nbytes) for weight in weights.values())


def weights_in(weights: Mapping[str, TypedWeight]) -> int:
    """How many numbers all these weights have."""
    return sum(math.prod(weight.shape) for weight in weights.values())


def compressible(request: PlanRequest, takes_pieces: bool) -> PlanRequest:
    """The same without the linears that no format can store as integers.

    Args:
        request: All linears that the recipe selects.
        takes_pieces: Whether experts are compressed that the checkpoint stores in one tensor.

    Raises:
        NotImplementedError: No linear is left.
    """
    source = request.source
    modules, stored = dict(request.skeleton.model.named_modules()), dict(source.stored_names)
    if takes_pieces:
        stored |= {name: name for name in source.pieces}
    left = request.limited(
        lambda name: (
            stored.get(f"{name}.weight", "").endswith(".weight")
            and type(modules[name]) is nn.Linear
        )
    )
    if not left.linears:
        raise NotImplementedError(
            "none of the chosen linears can be stored as integers: they are transposed, "
            "special, or experts in one tensor; such a checkpoint cannot be compressed yet"
        )
    return left


def parts_of(request: PlanRequest, tensors: Mapping[str, Any]) -> Counter[str]:
    """What takes the bytes of a folder, for people -> how many.

    Args:
        request: What the folder is made of.
        tensors: Stored name -> something with a shape and a dtype, of all tensors of the folder.
    """
    source, weights = request.source, request.skeleton.vocabulary_weights
    # The embedding comes last, so that a tied head counts as embedding.
    named = {"output head": weights.head, "embeddings": weights.embedding}
    kinds = {
        source.stored_names.get(f"{linear.name}.weight", linear.name).removesuffix(".weight"): kind
        for kind, linear in named.items()
        if linear is not None
    }
    parts = Counter[str]()
    for name, info in tensors.items():
        linear = name.rpartition(".")[0]
        dense = source.checkpoint.tensors.get(name)
        rounded = dense is None or dense.dtype != info.dtype
        kind = "other weights" if len(info.shape) > 1 else "norms and biases"
        kind = kinds.get(linear, "linears" if rounded else kind)
        what = f"rounded {kind}" if rounded else f"{kind} in {str(info.dtype).partition('.')[2]}"
        parts[what] += math.prod(info.shape) * info.dtype.itemsize
    return parts
