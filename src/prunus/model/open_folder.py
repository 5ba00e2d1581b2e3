"""A model's folder, opened once and handed on: configuration and headers are read once per folder.

Everything is read when somebody first asks for it. Whoever needs the configuration, the headers or
the kind of a model takes the open folder in place of its path.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from prunus.model.checkpoint.files import parse_json, read_limited
from prunus.model.checkpoint.quantization_config import method_of
from prunus.model.checkpoint.quantized import METHODS, DenseCheckpoint
from prunus.model.checkpoint.tensor_files import Checkpoint
from prunus.model.config import NO_WEIGHTS, StoredSizes, check_numbers
from prunus.model.formats import reader_of, refuse_packed
from prunus.model.kinds import Kind, kind_of
from prunus.words import reason

#: The file that describes an adapter.
ADAPTER_CONFIG = "adapter_config.json"
# How the names of weights end, and the dtypes in which they are plain numbers.
_WEIGHTS = (".weight", "_proj")
_NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class OpenFolder:
    """The folder of a model. `model.checkpoint.resolve.open_folder` finds it.

    Attributes:
        path: A Hugging Face checkpoint, or a model in another format; see `format`.
        trust_remote_code: Let transformers run code that comes with the checkpoint.
        made_from: The model in another format that the folder was unpacked from; None for a folder
            that is read as it is.
    """

    path: Path
    trust_remote_code: bool = False
    made_from: OpenFolder | None = None

    @property
    def config_path(self) -> Path:
        """The file config.json."""
        return self.path / "config.json"

    @functools.cached_property
    def config_bytes(self) -> bytes | None:
        """The bytes of config.json; None without one."""
        return read_limited(self.config_path) if self.config_path.exists() else None

    @functools.cached_property
    def raw(self) -> dict[str, Any]:
        """The content of config.json; empty without one.

        Raises:
            ValueError: The file is too large, or no JSON object.
        """
        return {} if self.config_bytes is None else parse_json(self.config_path, self.config_bytes)

    @functools.cached_property
    def format(self) -> Any:
        """The class of the format that opens the model, where transformers cannot; else None."""
        return reader_of(self.path, self.raw)

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter rather than a whole model."""
        return (self.path / ADAPTER_CONFIG).is_file()

    def require_config(self) -> None:
        """Check that this is the folder of a checkpoint.

        Raises:
            FileNotFoundError: It has no config.json.
            ValueError: It is packed by an earlier version of prunus.
        """
        if self.config_bytes is None:
            raise FileNotFoundError(
                f"{self.path} holds an adapter: merge it into its base model with peft's "
                "`merge_and_unload`, save the result with its tokenizer, and give that"
                if self.is_adapter
                else f"{self.path} has no config.json; is it a Hugging Face checkpoint folder?"
            )
        refuse_packed(self.path, self.raw)

    @property
    def quantization(self) -> dict[str, Any]:
        """How config.json says that the weights are quantised; empty for a dense checkpoint."""
        described = self.raw.get("quantization_config")
        return described if isinstance(described, dict) else {}

    @property
    def is_foreign(self) -> bool:
        """Whether the weights are quantised in a way that only other programs read."""
        return bool(self.quantization) and method_of(self.quantization) not in METHODS

    @property
    def dense_config(self) -> dict[str, Any]:
        """The content of config.json for the dense weights."""
        return {key: x for key, x in self.raw.items() if key != "quantization_config"}

    @functools.cached_property
    def stored_checkpoint(self) -> Checkpoint:
        """The weights as they are stored, of which the headers are read.

        Raises:
            FileNotFoundError, ValueError: As `Checkpoint`.
        """
        return Checkpoint(self.path)

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The weights; quantised ones as the dense weights, expanded when they are read.

        These have the dtype that config.json names, or bfloat16.

        Raises:
            FileNotFoundError, ValueError: As `Checkpoint`, or the weights are quantised in a way
                that prunus does not read, or not as config.json says.
        """
        self.require_config()
        if not self.quantization:
            return self.stored_checkpoint
        names = {str(self.raw.get(field)) for field in ("dtype", "torch_dtype")}
        known = (x for x in _NUMBERS if str(x).removeprefix("torch.") in names)
        dtype = next(known, torch.bfloat16)
        dense = DenseCheckpoint(self.stored_checkpoint, self.quantization, dtype)
        _check_dtypes(dense)
        return dense

    @functools.cached_property
    def config(self) -> Any:
        """The transformers configuration of the dense model, after its numbers are checked.

        Raises:
            FileNotFoundError: The folder has no config.json.
            ValueError: The file is damaged or asks for more than the weights hold, transformers
                knows no such model, or the checkpoint is packed.
        """
        self.require_config()
        self.check_config()
        try:
            config = AutoConfig.from_pretrained(
                self.path, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except Exception as fault:  # transformers raises errors of many kinds for a damaged file
            raise ValueError(
                f"{self.config_path} describes no model that transformers "
                f"{transformers.__version__} knows: {reason(fault)}"
            ) from fault
        vars(config).pop("quantization_config", None)
        if not self.quantization and any(self.path.glob("*.safetensors")):
            _check_dtypes(self.stored_checkpoint)
        return config

    @property
    def kind(self) -> Kind:
        """The kind of the model; see `kind_of`."""
        return kind_of(self.config)

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens that the model knows; None if its configuration does not say."""
        size = getattr(self.config.get_text_config(), "vocab_size", None)
        return size if isinstance(size, int) else None

    def check_config(self) -> None:
        """Check the numbers in config.json against the weights. A folder without one passes.

        Raises:
            ValueError: The file is no JSON object or too deep, or a number in it exceeds all that
                the checkpoint stores; the message names the field.
        """
        if self.raw:
            check_numbers(self.config_path, self.raw, self._sizes)

    @functools.cached_property
    def _sizes(self) -> StoredSizes:
        """What the folder stores; see `NO_WEIGHTS` for a folder without weights."""
        try:
            return StoredSizes.of(self.stored_checkpoint)
        except FileNotFoundError:
            return NO_WEIGHTS


def _check_dtypes(checkpoint: Checkpoint) -> None:
    """Check that weights are stored as numbers, where no configuration says what codes mean.

    Raises:
        ValueError: A weight is stored in integers or in floats of 8 bits; names it.
    """
    for name, info in checkpoint.tensors.items():
        if name.endswith(_WEIGHTS) and info.dtype not in _NUMBERS:
            raise ValueError(
                f"{checkpoint.folder} stores {name} as {str(info.dtype).removeprefix('torch.')}, "
                "and its config.json has no quantization_config that says which weights these "
                "codes stand for: give the model in bfloat16, float16 or float32"
            )
