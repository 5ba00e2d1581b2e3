"""What the formats of compressed models have in common.

Each weight gets one of a few types, which is a quantiser. In a `MixFormat` the sizes of all weights
together, embeddings and head included, decide which. The base class `Format` says in which order a
run asks a format.
"""

from __future__ import annotations

import functools
import math
import re
import shlex
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from prunus.engine.folder import BlockFolder
from prunus.engine.linear_job import Format, LinearSelection
from prunus.engine.record import extended_card
from prunus.formats.recipe import CompressionRecipe
from prunus.formats.records import CompressionRecord, FileSize
from prunus.formats.type_choice import Choice, Measurement, TypeChoice, choose_types
from prunus.hardware.errors import naming
from prunus.hardware.sizes import in_bytes
from prunus.methods.group_fits import round_in_groups
from prunus.methods.group_quantizer import GroupedWeight, GroupQuantizer, check_range
from prunus.methods.group_sweep import quantize_in_groups
from prunus.methods.statistics import InputStatistics
from prunus.model.checkpoint.atomic_files import make_folder, read_json, write_json, write_text
from prunus.model.checkpoint.output_folder import auxiliary_files, copy_companion
from prunus.model.checkpoint.reader import SINGLE_NAME, Checkpoint
from prunus.model.checkpoint.regular_files import read_card
from prunus.model.checkpoint.writer import Writable, file_nbytes, save_safetensors
from prunus.model.embeddings import is_plain
from prunus.model.formats import format_named, format_of
from prunus.model.kinds import require_causal
from prunus.model.linears import is_tied, tied_embedding
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource

# Rows of the output head that are rounded together: a part of it in float32, not all.
_HEAD_ROWS = 2**14


class CompressedFormat(Format[CompressionRecord]):
    """A format in which each weight gets one of a few quantisers.

    Args:
        recipe: The recipe of the run. Every run has a format of its own.

    Attributes:
        PROGRAMS: Name of a program -> the command that runs a result of the format, where OUT is
            its path, BASE its path without the suffix, and NAME a name for it.
        UPLOADS: What is uploaded to the hub -> the command.
        lasting: What is known of the measurement before the run, which lasts with it.
    """

    RECORD = CompressionRecord
    DONE: ClassVar[str] = "compressed"
    PROGRAMS: ClassVar[Mapping[str, str]] = {}
    UPLOADS: ClassVar[Mapping[str, str]] = {"to the hub": "hf upload NAME OUT"}
    #: Whether experts are compressed that the checkpoint stores in one tensor.
    takes_pieces = False
    lasting = Measurement()

    def __init__(self, recipe: CompressionRecipe) -> None:
        self.recipe = recipe
        self.rounding = recipe.rounding

    # How a result is read.

    @staticmethod
    def owns(path: Path) -> bool:
        """Whether a path whose name or configuration names the format is such a result."""
        return path.is_file()

    @classmethod
    def unpack(
        cls,
        path: Path,
        dest: Path,
        *,
        overwrite: bool = False,
        dtype: str | None = "bfloat16",
        progress: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Write a result as a checkpoint that transformers can read.

        Here the result is a folder. The whole model is in memory, and each weight has the dtype of
        its scales, whatever the options say.

        Args:
            path: The result.
            dest: A folder that does not exist or is empty.
            overwrite: Whether to replace what `dest` holds.
            dtype: Dtype of the weights in the checkpoint; None leaves it to the format.
            progress: Called with a line of text before each step; None for silence.

        Returns:
            Facts about the checkpoint, as values for JSON.

        Raises:
            ValueError: A weight is stored in another way.
        """
        source, config = Checkpoint(path), read_json(path / "config.json")
        tensors = dict(source.read(source.tensors))
        cls.make_dense(tensors, config)
        make_folder(dest)
        for file in auxiliary_files(path):
            copy_companion(file, dest / file.name)
        save_safetensors(dest / SINGLE_NAME, tensors)
        write_json(dest / "config.json", config)
        return {"tensors": len(tensors)}

    @staticmethod
    def make_dense(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        """Turn the content of a folder into that of a plain checkpoint, in place.

        Args:
            tensors: All stored tensors by name. A weight takes the place of its parts.
            config: The content of config.json. What describes the format leaves it.

        Raises:
            ValueError: A weight is stored in another way.
        """
        raise NotImplementedError("a file is no folder of tensors")

    @staticmethod
    def read_record(path: Path) -> CompressionRecord | None:
        """The record in a result; None if prunus did not make it."""
        return CompressionRecord.load(path) if (path / CompressionRecord.FILE).exists() else None

    @classmethod
    def stored_types(cls, path: Path) -> dict[str, tuple[str, float]]:
        """Full name of a linear -> its type and its bits per weight; empty if not recorded."""
        record = cls.read_record(path)
        if record is None:
            return {}
        return {
            f"{block.name}.{name}": (record.types[f"{block.name}.{name}"], linear.bits or 0.0)
            for block in record.blocks
            for name, linear in block.linears.items()
        }

    @staticmethod
    def stored_bits(path: Path) -> float | None:
        """Bits per weight of the linears in the blocks of a file; None where it does not say."""
        return None

    @classmethod
    def commands(cls, path: Path, uploads: bool = False) -> dict[str, str]:
        """Name of a program -> the command by which it runs a result, ready to be copied.

        Args:
            path: The result, or what stands for it.
            uploads: Whether to add how it is uploaded to the hub.
        """
        name = path.with_suffix("").name if format_of(path) else path.name
        values = {"OUT": str(path), "BASE": str(path.with_name(name)), "NAME": name.lower()}
        return {
            program: re.sub("OUT|BASE|NAME", lambda part: shlex.quote(values[part[0]]), command)
            for program, command in ({**cls.PROGRAMS, **(cls.UPLOADS if uploads else {})}).items()
        }

    # What a check of the finished result asks.

    def card_path(self, path: Path) -> Path:
        """The model card of a result."""
        return path / "README.md"

    def store_record(self, path: Path, record: CompressionRecord) -> None:
        """Replace the record of a finished result."""
        record.save(path)

    def enter_check(self, path: Path, record: CompressionRecord) -> None:
        """Enter what a check found into the card and the record of a finished result."""
        card, text = self.card_path(path), "\n\n".join(record.check_sentences())
        write_text(card, extended_card(read_card(card), "Checked", text, name=path.name))
        self.store_record(path, record)

    # What a run asks.

    def select(
        self, selection: LinearSelection, source: CheckpointSource | ModuleSource, model: Skeleton
    ) -> LinearSelection:
        """The linears of a causal LM that can be stored as integers.

        Raises:
            ValueError: The source is a loaded model, or a model of another kind.
            NotImplementedError: No chosen linear can be stored as integers.
        """
        if isinstance(source, ModuleSource):
            raise ValueError(
                "compress writes the files of a new model: give the folder of a checkpoint instead "
                "of a loaded model"
            )
        require_causal(source.config, "prunus compress")
        modules, stored = dict(model.model.named_modules()), dict(source.stored)
        if self.takes_pieces:
            stored |= {name: name for name in source.pieces}
        selection = selection.limited(
            model,
            lambda name: (
                stored.get(f"{name}.weight", "").endswith(".weight")
                and type(modules[name]) is nn.Linear
            ),
        )
        if not any(selection.selected):
            raise NotImplementedError(
                "none of the chosen linears can be stored as integers: they are transposed, "
                "special, or experts in one tensor; such a checkpoint cannot be compressed yet"
            )
        return selection

    @property
    def weights_outside(self) -> Mapping[str, list[str]]:
        """Stored names of embedding and head, as far as they have a type -> those of copies."""
        return {}

    def refuse_gguf_options(self, takes_nearest: bool = False) -> None:
        """Refuse the options of GGUF files.

        Args:
            takes_nearest: Whether the format can round each weight by itself too.

        Raises:
            ValueError: The recipe has one of them.
        """
        recipe, nearest = self.recipe, self.rounding == "nearest" and not takes_nearest
        if recipe.type or recipe.template or recipe.fast_on or nearest:
            raise ValueError(
                "`type`, `template`, `fast_on`, `rounding` nearest and lists for llama-quantize "
                "belong to GGUF files: give the output a name that ends in .gguf, or leave them "
                "out. `rounding` nearest is for compressed-tensors too"
            )

    # The size of a result that is a folder.

    def shards(
        self, quantizer: Callable[[str], GroupQuantizer] | None = None
    ) -> list[dict[str, Any]]:
        """Each shard of the result: name -> something with a shape and a dtype.

        What lies outside the blocks is first, then each block follows.

        Args:
            quantizer: From the name of a module to its type; None for the last one of each weight.
        """
        quantizer = quantizer or (lambda name: self.quantizers(name)[-1])
        source = self.job.checkpoint
        copies = {key for keys in self.weights_outside.values() for key in keys}
        outside = [key for key in source.outside_keys() if key not in copies]
        blocks = map(source.block_keys, range(len(self.job.skeleton)))
        shards: list[dict[str, Any]] = []
        for keys in (outside, *blocks):
            shards.append({})
            for key in keys:
                info = source.checkpoint.tensors[key]
                if (name := self.module_of.get(key)) is None:
                    shards[-1][key] = info
                    continue
                kind = quantizer(name)
                size = info.shape[0], kind.nbytes_of(info.shape[1])
                data_OB = torch.empty(size, dtype=torch.uint8, device="meta")
                shards[-1] |= self.tensors_of(key, GroupedWeight(kind, data_OB))
        return shards

    def file_bytes(self, choice: TypeChoice | None = None) -> int:
        """Bytes of the files with weights, as planned, or with the types of a choice."""
        return sum(map(file_nbytes, self.shards()))

    def finish(self, folder: BlockFolder, record: CompressionRecord) -> None:
        """Enter the size of the files as written, and complete the result."""
        written = Checkpoint(folder.folder, only=list(record.sha256))
        model = self.job.skeleton.model
        record.size = file_size(self.job.checkpoint, model, written.tensors, written.file_bytes())
        super().finish(folder, record)

    # How a weight becomes tensors.

    @abstractmethod
    def tensors_of(self, key: str, weight: GroupedWeight) -> dict[str, torch.Tensor]:
        """The tensors of a shard that store a quantised weight.

        Args:
            key: The name under which the source stores the weight.
            weight: The weight as its type stores it.
        """

    @abstractmethod
    def weight_from(
        self, key: str, tensors: dict[str, torch.Tensor], quantizer: GroupQuantizer
    ) -> torch.Tensor:
        """The dense weight that `tensors_of` has stored.

        Args:
            key: The name under which the source stores the weight.
            tensors: The tensors of the shard, from which those of this weight are removed.
            quantizer: The type of the weight.
        """

    # Which types the weights can have, and get.

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """First module of each weight that has a type -> its shape, with the columns last."""

    @abstractmethod
    def quantizers(self, name: str) -> Sequence[GroupQuantizer]:
        """The quantisers that the weight of a module can have.

        Args:
            name: Name of a linear, an embedding or a head.
        """

    @functools.cached_property
    def reach(self) -> tuple[int, int]:
        """The bytes of all weights with a type, each with its smallest and its largest one."""
        sizes = [[x.nbytes for x in choices] for choices in self.choices({}).values()]
        return sum(map(min, sizes)), sum(map(max, sizes))

    @property
    def budget(self) -> int:
        """The most bytes of all weights that have a type: here those of the smallest types."""
        return self.reach[0]

    @functools.cached_property
    def stacks(self) -> Mapping[str, Sequence[str]]:
        """First module of a weight -> all modules that have one type with it."""
        return {first: [first] for first in self.shapes}

    @functools.cached_property
    def module_of(self) -> dict[str, str]:
        """Stored name of a weight -> name of its module, for all that have a type."""
        return {
            self.job.stored_key(name): name for first in self.shapes for name in self.stacks[first]
        }

    def check_widths(self, group: int) -> None:
        """Check that all weights with a type consist of whole groups.

        Args:
            group: The number of columns of the smallest group.

        Raises:
            ValueError: A weight does not; names it.
        """
        for name, shape in self.shapes.items():
            if shape[-1] % group:
                raise ValueError(
                    f"{name} has {shape[-1]} inputs, and groups need a number that {group} "
                    "divides: keep it as it is with `ignore`, or embeddings and head with "
                    "`head_bits` none"
                )

    def scale_dtype(self, name: str) -> torch.dtype:
        """The dtype of the scales of a module: bfloat16, or float16 where that is its own."""
        # What is stored in float32 is run in bfloat16 or float16, and nearly all scales that are
        # exact in bfloat16 are exact in both.
        stored = self.job.stored_dtype(name)
        return torch.float16 if stored == torch.float16 else torch.bfloat16

    def nbytes_of(self, quantizer: GroupQuantizer, shape: tuple[int, ...]) -> int:
        """The bytes of a weight of this shape in the result."""
        return quantizer.nbytes_of(math.prod(shape))

    def time_of(self, name: str, quantizer: GroupQuantizer, shape: tuple[int, ...]) -> float:
        """Nanoseconds that a weight of this shape takes for each token; 0 if it does not matter."""
        return 0.0

    @property
    def most_time(self) -> float:
        """The most nanoseconds that all weights may take for each token; infinity for any time."""
        return math.inf

    def choices(self, losses: Mapping[str, torch.Tensor]) -> dict[str, list[Choice]]:
        """First module of a weight -> the types that it can have.

        Args:
            losses: First module -> the loss that each of its types adds, in the order of
                `quantizers`; 0 for modules that are not in it.
        """
        choices: dict[str, list[Choice]] = {}
        for first, shape in self.shapes.items():
            quantizers = self.quantizers(first)
            of_types = losses.get(first, torch.zeros(len(quantizers))).tolist()
            choices[first] = [
                Choice(
                    quantizer.name,
                    self.nbytes_of(quantizer, shape),
                    loss,
                    self.time_of(first, quantizer, shape),
                )
                for quantizer, loss in zip(quantizers, of_types, strict=True)
            ]
        return choices

    def choice(self, measurement: Measurement) -> TypeChoice:
        """The types of least loss by a measurement."""
        chosen = choose_types(self.choices(measurement.losses), self.budget, self.most_time)
        quantizers = {
            name: self.quantizer(name, choice.kind)
            for first, choice in chosen.items()
            for name in self.stacks[first]
        }
        return TypeChoice(chosen, quantizers, measurement.importances)

    def quantizer(self, name: str, kind: str) -> GroupQuantizer:
        """How the weight of a module is quantised with the type of this name."""
        return next(x for x in self.quantizers(name) if x.name == kind)

    def said(self, choice: TypeChoice) -> str:
        """What to tell people once the types are chosen; empty for nothing."""
        return ""

    def rounded_outside(
        self, name: str, choice: TypeChoice, statistics: InputStatistics | None
    ) -> GroupedWeight:
        """The weight of an embedding or a head in its type, with the measured importance.

        Args:
            name: Name of the module.
            choice: The type of each weight.
            statistics: The inputs of the head, and what its errors cost as an embedding; None where
                the head is rounded by its importance too.

        Raises:
            ValueError: Weights are beyond the values of the type; the message names the weight.
        """
        key = self.job.stored_key(name)
        weight_OI = self.job.checkpoint.checkpoint.whole(key)
        quantizer = choice.quantizers[name]
        with naming(key):
            if name != self.head or statistics is None:
                return round_in_groups(weight_OI, quantizer, choice.importances.get(name))
            work = replace(self.job.work, quantization=quantizer)
            parts = []
            for rows_OI in weight_OI.split(_HEAD_ROWS):
                rows_OI = rows_OI.to(self.job.device, torch.float32)
                grouped = quantize_in_groups(rows_OI, statistics, work).quantized
                assert isinstance(grouped, GroupedWeight)
                parts.append(grouped.data_OB.cpu())
            return GroupedWeight(quantizer, torch.cat(parts))

    def check_outside(self, choice: TypeChoice) -> None:
        """Check before the first block that the types of embedding and head reach their weights.

        Raises:
            ValueError: They do not; the message names the weight.
        """
        for name in choice.quantizers.keys() - self.job.selected_linears().keys():
            key = self.job.stored_key(name)
            with naming(key):
                check_range(self.job.checkpoint.checkpoint.whole(key), choice.quantizers[name])

    @functools.cached_property
    def head(self) -> str | None:
        """The module that has the weight of the output head, if that weight has a type.

        It is the embedding where both are tied.
        """
        model = self.job.skeleton.model
        modules, head = dict(model.named_modules()), model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            return None
        return next((name for name in self.shapes if modules[name].weight is head.weight), None)

    def rounds_head(self, choice: TypeChoice) -> bool:
        """Whether errors of the head are corrected by its later columns: where they are measured.

        An embedding that is tied to it has errors of its own, which must be known too.
        """
        return self.rounding == "feedback" and self.head in choice.importances

    def outside(
        self,
        choice: TypeChoice,
        tensors: dict[str, Writable],
        statistics: InputStatistics | None,
    ) -> dict[str, Writable]:
        """The tensors of the shard of what lies outside the blocks, some of them in their types.

        Args:
            choice: The type of each weight.
            tensors: The tensors of the source by stored name.
            statistics: The inputs of the output head, if `rounds_head` asks for them.
        """
        if statistics is not None and self.head is not None:
            statistics.add_uncorrelated(choice.importances[self.head] * statistics.tokens)
        for key, copies in self.weights_outside.items():
            for dense in (key, *copies):
                del tensors[dense]
            weight = self.rounded_outside(self.module_of[key], choice, statistics)
            tensors |= self.tensors_of(key, weight)
        return tensors


class MixFormat(CompressedFormat):
    """A format whose `size` or `bits` decide the types of all weights, with embeddings and head."""

    @property
    @abstractmethod
    def others(self) -> int:
        """The bytes of all that has no type, whatever the types are."""

    @property
    def measures_loss(self) -> bool:
        """Whether types are chosen by the loss that they cause. A type that is given is not."""
        return super().measures_loss or self.recipe.type is None

    @functools.cached_property
    def weights_outside(self) -> dict[str, list[str]]:
        """Stored names of embedding and head -> those of copies; empty if `head_bits` is none."""
        if self.recipe.head_bits == "none":
            return {}
        return embedding_and_head(self.job.skeleton.model, self.job.checkpoint.stored)

    @functools.cached_property
    def modules_outside(self) -> set[str]:
        """The embedding and the head, as far as they have a type."""
        stored = self.job.checkpoint.stored.items()
        return {name.removesuffix(".weight") for name, key in stored if key in self.weights_outside}

    @property
    def budget(self) -> int:
        """The bytes of all weights with a type: what `size` or `bits` leave for them.

        Without both, each weight has its smallest type.
        """
        if self.recipe.size is not None:
            return self.recipe.size - self.others
        if self.recipe.bits is not None:
            return int(self.recipe.bits * self._weights / 8)
        return super().budget

    @property
    def _weights(self) -> int:
        """How many weights have a type."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def check_reach(self, result: str) -> None:
        """Check that the types reach the bits or the size that the recipe asks for.

        Args:
            result: What people call the result, such as "a GGUF file".

        Raises:
            ValueError: They do not; says what is possible.
        """
        if not self.reach[0] <= self.budget <= self.reach[1]:
            bits = " to ".join(f"{8 * nbytes / self._weights:.2f}" for nbytes in self.reach)
            sizes = " to ".join(in_bytes(nbytes + self.others) for nbytes in self.reach)
            raise ValueError(
                f"{self.recipe.target} is not possible in {result} of this model: its types "
                f"take {bits} bits per weight, with embeddings and head, and such files {sizes}"
            )

    def file_bytes(self, choice: TypeChoice | None = None) -> int:
        """Bytes of the files with weights, as planned."""
        return self.others + self.budget

    def planned_parts(self) -> Counter[str]:
        """What will take the bytes of the result, before the types are chosen."""
        kinds = {choice.kind: None for types in self.choices({}).values() for choice in types}
        return Counter(
            {f"the best mix of {', '.join(kinds)}": self.budget, "all else": self.others}
        )


def file_size(
    source: CheckpointSource, model: Any, tensors: Mapping[str, Any], after: int
) -> FileSize:
    """The size of a result and what takes its bytes.

    Args:
        source: The source.
        model: The skeleton of the source.
        tensors: Stored name -> something with a shape and a dtype, of all tensors of the result.
        after: Bytes of the files of the result.
    """
    # The embedding comes last, so that a tied head counts as embedding.
    modules = {id(model.get_output_embeddings()): "output head"}
    modules[id(model.get_input_embeddings())] = "embeddings"
    kinds = {
        source.stored.get(f"{name}.weight", name).removesuffix(".weight"): modules[id(module)]
        for name, module in reversed(list(model.named_modules()))
        if id(module) in modules
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
    return size_of(source.checkpoint, after, parts)


def size_of(source: Checkpoint, after: int, parts: Counter[str]) -> FileSize:
    """The size of a result that has `after` bytes in these parts."""
    parameters = sum(math.prod(info.shape) for info in source.tensors.values())
    return FileSize.of(source.file_bytes(), after, parameters, parts)


def embedding_and_head(model: Any, stored: Mapping[str, str]) -> dict[str, list[str]]:
    """The embedding and the head that can have types; only the first if they are tied.

    Args:
        model: The skeleton of the source.
        stored: Name in the model -> stored name, as in `CheckpointSource`.

    Returns:
        Stored name of the weight -> stored names of copies of it: a tied head may be stored too.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    keys = [
        stored.get(names.get(id(module), ""), "") if module is not None and is_plain(module) else ""
        for module in (embedding, head)
    ]
    if not is_tied(model):
        return {key: [] for key in keys if key.endswith(".weight")}
    # A checkpoint may store a tied weight twice, or as the head alone, which stays as it is.
    holds = tied_embedding(model) is not None and keys[0].endswith(".weight")
    return {keys[0]: [key for key in keys[1:] if key]} if holds else {}


def format_for(output: Path | None, recipe: CompressionRecipe) -> CompressedFormat:
    """The format of an output.

    Args:
        output: The folder or the file of the result; None for a folder that is not known yet.
        recipe: The recipe of the run.

    Raises:
        ValueError: The recipe names the format of a folder, and the output is a file.
    """
    by_suffix = None if output is None else format_of(output)
    if by_suffix is not None and "format" in recipe.model_fields_set:
        raise ValueError(
            f"{recipe.format} is the format of a folder: give the output a name that does not end "
            f"in {by_suffix.suffix}, or leave `format` out"
        )
    entry = by_suffix or format_named(recipe.format)
    compressed: CompressedFormat = entry.load()(recipe)
    return compressed
