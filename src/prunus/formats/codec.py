"""What a format is: how one weight becomes tensors, and back.

A `Codec` has no state, and its eight methods are all that a new format adds; the page "Add a
format" follows one. Which codec an output gets, `codec_for` says by the table of
`formats/table.py`. The runs, their folders and files are the engine's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file

from prunus.engine.linear_plan import LinearSelection
from prunus.engine.result import MEASUREMENT, Result
from prunus.model.checkpoint.files import make_folder, read_json, write_json
from prunus.model.checkpoint.output_folder import auxiliary_files, copy_companion
from prunus.model.checkpoint.tensor_files import SINGLE_NAME, Checkpoint, save_safetensors
from prunus.model.formats import format_named, format_of
from prunus.model.kinds import require_causal
from prunus.model.source import ModuleSource, OpenModel
from prunus.rounding.compression_recipe import CompressionRecipe
from prunus.rounding.compression_record import CompressionRecord
from prunus.rounding.group_quantizer import GroupedWeight, GroupQuantizer
from prunus.rounding.size_plan import PlanRequest, SizePlan, compressible
from prunus.rounding.type_choice import Measurement


class Codec(ABC):
    """A format in which each weight gets one of a few types.

    Attributes:
        PROGRAMS: Name of a program -> the command that runs a result of the format, where OUT is
            its path, BASE its path without the suffix, and NAME a name for it.
        UPLOADS: What is uploaded to the hub -> the command.
        RESULT: What a run writes: a folder, or a file that is made from one.
        SCALES: The names of the stored scales and biases (O, S) of a weight, where MODULE is that
            of its module; () if they are in the bytes of `GroupedWeight`.
    """

    PROGRAMS: ClassVar[Mapping[str, str]] = {}
    UPLOADS: ClassVar[Mapping[str, str]] = {"to the hub": "hf upload NAME OUT"}
    RESULT: ClassVar[type[Result[CompressionRecord]]] = Result
    SCALES: ClassVar[Sequence[str]] = ()

    # How a run writes it.

    @classmethod
    @abstractmethod
    def plan(cls, request: PlanRequest) -> SizePlan:
        """Which weights have types, which types, and what all may take together.

        Raises:
            ValueError: The format cannot do what the recipe asks for.
            NotImplementedError: The format cannot store the model.
        """

    @staticmethod
    @abstractmethod
    def encode(key: str, weight: GroupedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors of a shard that store a weight.

        Args:
            key: The name under which the source stores the weight.
            weight: The weight as its type stores it.
            dtype: The dtype in which the source stores it.
        """

    @staticmethod
    @abstractmethod
    def decode(
        key: str, tensors: dict[str, torch.Tensor], quantizer: GroupQuantizer
    ) -> torch.Tensor:
        """The dense weight that `encode` has stored, float32 (O, I).

        Args:
            key: The name under which the source stores the weight.
            tensors: The tensors of the shard, from which those of this weight are removed.
            quantizer: The type of the weight.
        """

    # How a result is read, another program's too.

    @staticmethod
    def owns(path: Path) -> bool:
        """Whether a path whose name or configuration names the format is such a result."""
        return path.is_file()

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

    @classmethod
    def unpack(
        cls,
        path: Path,
        dest: Path,
        *,
        dtype: str | None = "bfloat16",
        progress: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Write a result as a checkpoint that transformers can read.

        Here the result is a folder. The whole model is in memory, and each weight has the dtype of
        its scales, whatever the options say.

        Args:
            path: The result.
            dest: A folder that does not exist.
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
    def read_record(path: Path) -> CompressionRecord | None:
        """The record in a result; None if prunus did not make it."""
        return CompressionRecord.load(path) if (path / CompressionRecord.FILE).exists() else None

    @staticmethod
    def audit(path: Path, reads_weights: bool = False) -> Any:
        """What a file holds, as `gguf.audit.FileAudit`; None for a format of folders.

        Args:
            path: The file.
            reads_weights: Whether a few weights of each linear are read; else the header alone is.
        """
        return None


def rescale(
    codec: type[Codec],
    key: str,
    tensors: dict[str, torch.Tensor],
    quantizer: GroupQuantizer,
    factor_OS: torch.Tensor,
) -> None:
    """Multiply the scales of a stored weight, and round them as they are stored.

    Args:
        codec: The format.
        key: The name under which the source stores the weight.
        tensors: The tensors of the shard, of which those of the scales are replaced.
        quantizer: The type of the weight.
        factor_OS: float32, a factor for each span of each row.
    """
    for name in (x.replace("MODULE", key.removesuffix(".weight")) for x in codec.SCALES):
        tensors[name] = (tensors[name].float() * factor_OS).to(tensors[name].dtype)
    if not codec.SCALES:
        spans = quantizer.unpack(tensors[key].reshape(-1, quantizer.nbytes))
        d_N, dmin_N = (quantizer.as_scale(x * factor_OS.flatten()) for x in spans[:2])
        packed = quantizer.pack(spans._replace(d_N=d_N, dmin_N=dmin_N))
        tensors[key] = packed.view_as(tensors[key])


def codec_for(output: Path | None, recipe: CompressionRecipe) -> type[Codec]:
    """The codec of an output.

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
    codec: type[Codec] = (by_suffix or format_named(recipe.format)).load_codec()
    return codec


def size_plan_for(
    codec: type[Codec],
    recipe: CompressionRecipe,
    folder: Path | None,
    opened: OpenModel,
    selection: LinearSelection,
) -> SizePlan:
    """The plan of a result of compress.

    Args:
        codec: Its codec.
        recipe: The recipe of the run.
        folder: The folder of the run, which may hold the measurement of an unfinished one; None
            where that is not known.
        opened: The model.
        selection: The linears that the recipe selects.

    Raises:
        ValueError: The source is a loaded model, or a model of another kind, or the format cannot
            do what the recipe asks for.
        NotImplementedError: No chosen linear can be stored as integers.
    """
    if isinstance(opened.source, ModuleSource):
        raise ValueError(
            "compress writes the files of a new model: give the folder of a checkpoint instead "
            "of a loaded model"
        )
    require_causal(opened.source.config, "prunus compress")
    path = None if folder is None else folder / MEASUREMENT
    earlier = Measurement.of(load_file(path) if path is not None and path.exists() else {})
    request = PlanRequest(recipe, opened.source, opened.skeleton, selection, earlier)
    return codec.plan(compressible(request, takes_pieces=recipe.template is not None))
