"""Where the weights of a model come from, block by block, and where the pruned ones go.

Two kinds with one face: a checkpoint on disk, read and written a block at a time, and a model that is
already loaded, pruned in place. The engine does not know which of the two it works on.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.experts import Fused
from prunus.model.names import names_in_model
from prunus.model.skeleton import Skeleton

__all__ = ["CheckpointSource", "ModuleSource", "Source", "load_config", "tensors_digest"]


class Source(Protocol):
    """Stored weights of a model, addressed by the names of the model's own parameters."""

    config: Any
    fingerprint: str
    stored_dtype: torch.dtype

    def bind(self, skeleton: Skeleton) -> None:
        """Match stored names with the model's. Raises ValueError when weights are missing."""
        ...

    def outer(self, names: list[str], model: nn.Module) -> dict[str, torch.Tensor]:
        """Stored tensors outside the blocks, by the model's names; tied names that are not stored are left out."""
        ...

    def block(self, index: int) -> dict[str, torch.Tensor]:
        """Stored tensors of one block by names relative to it; may be views of a mapped file."""
        ...

    def block_nbytes(self, index: int) -> int:
        """Bytes of a block as stored."""
        ...


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a checkpoint folder.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: a configuration that this version of transformers does not know, or a quantised model.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} has no config.json; is it a Hugging Face checkpoint folder?"
        )
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as fault:
        reason = textwrap.shorten(str(fault), 300, placeholder=" …")
        raise ValueError(
            f"{folder / 'config.json'} describes no model that transformers {transformers.__version__} knows: {reason}"
        ) from fault
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{folder} holds quantised weights; prune the full-precision checkpoint, then quantise the result"
        )
    return config


class CheckpointSource:
    """The weights of a checkpoint folder. Opening reads headers only; see `Checkpoint` for the errors."""

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        self.config = load_config(folder, trust_remote_code)
        self.checkpoint = Checkpoint(folder)
        _check_sizes(folder, self.config, self.checkpoint)
        config_bytes = (folder / "config.json").read_bytes()
        self.fingerprint = hashlib.sha256(
            self.checkpoint.fingerprint.encode() + config_bytes
        ).hexdigest()
        self.stored_dtype = _main_dtype(
            {n: (t.dtype, t.nbytes) for n, t in self.checkpoint.tensors.items()}
        )
        self._stored: dict[str, str] = {}
        self._blocks: list[dict[str, str]] = []
        # Per block: key of a tensor that is several of the skeleton's -> how it is cut.
        self._fused: list[dict[str, Fused]] = []

    def bind(self, skeleton: Skeleton) -> None:
        stored, converted, unknown = names_in_model(skeleton, self.checkpoint.tensors)
        self._stored = stored
        self._refuse_unknown(skeleton, unknown)
        self._check_outside(skeleton)
        expected = skeleton.model.state_dict()
        self._blocks, self._fused = [], []
        for index in range(len(skeleton)):
            prefix = skeleton.block_name(index) + "."
            fused = {
                stored[prefix + each.name]: each
                for each in skeleton.fused(index)
                if prefix + each.name in stored
            }
            for key, each in fused.items():
                self._check_shape(key, each.shape)
            inside = {name for each in fused.values() for name in each.members}
            members = [
                name
                for name in expected
                if name.startswith(prefix) and name.removeprefix(prefix) not in inside
            ]
            for name in members:
                if name not in stored:
                    if converted:
                        raise NotImplementedError(
                            f"{name} is stored in another form ({next(iter(converted))!r} and others); models whose "
                            "weights are regrouped in this way when they are loaded cannot be pruned yet"
                        )
                    raise ValueError(
                        f"{self.checkpoint.folder} holds no weight for {name}; is the checkpoint whole?"
                    )
                self._check_shape(stored[name], tuple(expected[name].shape))
            self._blocks.append({name.removeprefix(prefix): stored[name] for name in members})
            self._fused.append(fused)

    def _refuse_unknown(self, skeleton: Skeleton, unknown: Mapping[str, str]) -> None:
        """A matrix among the blocks that the model has no place for would be passed on dense without a word."""
        ignored = getattr(skeleton.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        for name, key in unknown.items():
            if (
                name.startswith(f"{skeleton.path}.")
                and name.endswith(
                    ".weight"
                )  # old checkpoints of GPT-2 and others store masks as attn.bias
                and len(self.checkpoint.tensors[key].shape) > 1
                and not any(re.search(rule, name) for rule in ignored)
            ):
                raise ValueError(
                    f"{self.checkpoint.folder} holds {key!r}, but the model that config.json describes has no such "
                    f"weight in its {len(skeleton)} blocks; config and weights do not belong together"
                )

    def _check_outside(self, skeleton: Skeleton) -> None:
        """Embeddings, norms and head must be stored, under one of their names where they are tied."""
        state = skeleton.model.state_dict(keep_vars=True)
        tied = {id(tensor) for name, tensor in state.items() if name in self._stored}
        for name in skeleton.outside_parameter_names:
            if name not in self._stored and id(state[name]) not in tied:
                raise ValueError(
                    f"{self.checkpoint.folder} holds no weight for {name}; is the checkpoint whole?"
                )
            if name in self._stored:
                self._check_shape(self._stored[name], tuple(state[name].shape))

    def _check_shape(self, key: str, expected: tuple[int, ...]) -> None:
        info = self.checkpoint.tensors[key]
        if info.shape != expected:
            raise ValueError(
                f"{key} has shape {info.shape}, but config.json asks for {expected}; config and weights do not belong "
                "together"
            )

    def outer(self, names: list[str], model: nn.Module) -> dict[str, torch.Tensor]:
        keys = {self._stored[name]: name for name in names if name in self._stored}
        return {keys[key]: tensor for key, tensor in self.checkpoint.read(keys)}

    def stored_name(self, name: str) -> str:
        """The checkpoint's name for one of the model's tensors."""
        return self._stored[name]

    def stored_names(self) -> dict[str, str]:
        """The model's name -> the checkpoint's, for every tensor that is stored."""
        return dict(self._stored)

    def block_keys(self, index: int) -> list[str]:
        """Names in the checkpoint of a block's tensors."""
        return [*self._blocks[index].values(), *self._fused[index]]

    def block(self, index: int) -> dict[str, torch.Tensor]:
        return self.from_stored(index, self.checkpoint.read(self.block_keys(index)))

    def from_stored(
        self, index: int, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """A block's tensors, given by the checkpoint's names, by names relative to the block; fused ones in pieces."""
        names = {key: name for name, key in self._blocks[index].items()}
        found: dict[str, torch.Tensor] = {}
        for key, tensor in tensors:
            fused = self._fused[index].get(key)
            found |= {names[key]: tensor} if fused is None else fused.cut(tensor)
        return found

    def as_stored(self, index: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The way back from `from_stored`: a whole block's tensors by the checkpoint's names."""
        plain = {key: tensors[name] for name, key in self._blocks[index].items()}
        return plain | {key: fused.join(tensors) for key, fused in self._fused[index].items()}

    def block_nbytes(self, index: int) -> int:
        return self.checkpoint.nbytes(self.block_keys(index))

    def outside_keys(self) -> list[str]:
        """Checkpoint names of everything that belongs to no block, in sorted order."""
        inside = {key for index in range(len(self._blocks)) for key in self.block_keys(index)}
        return sorted(key for key in self.checkpoint.tensors if key not in inside)

    def check_outside_finite(self) -> None:
        """See that embeddings, final norm and head, which a run copies, hold no NaN and no infinity.

        Raises:
            ValueError: names the tensor.
        """
        for key in self.outside_keys():
            for _, tensor in self.checkpoint.read([key]):
                if tensor.is_floating_point() and not all(
                    x.isfinite() for x in torch.aminmax(tensor)
                ):
                    raise ValueError(
                        f"{key} holds weights that are not finite (NaN or infinity); the checkpoint is damaged"
                    )


class ModuleSource:
    """The weights of a loaded model. Reading gives the model's own tensors; writing changes them in place."""

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_input_embeddings"):
            raise TypeError(
                f"expected a transformers model or the path of a checkpoint; got {type(model).__name__}"
            )
        if getattr(config, "quantization_config", None):
            raise ValueError(
                "the model is quantised; prune it in full precision, then quantise the result"
            )
        self.model = model
        # A copy with the attention implementation in use, so that the skeleton computes as the model does.
        self.config = copy.deepcopy(config)
        self.config._attn_implementation = config._attn_implementation
        self.config.architectures = [type(model).__name__]
        self.fingerprint = "in memory"
        state = model.state_dict()
        self.stored_dtype = _main_dtype({n: (t.dtype, t.nbytes) for n, t in state.items()})
        self._path = ""
        self._fused: list[dict[str, Fused]] = []

    def bind(self, skeleton: Skeleton) -> None:
        self._path = skeleton.path
        self._fused = [
            {each.name: each for each in skeleton.fused(i)} for i in range(len(skeleton))
        ]

    def outer(self, names: list[str], model: nn.Module) -> dict[str, torch.Tensor]:
        state = self.model.state_dict()
        return {name: state[name] for name in names}

    def block(self, index: int) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, tensor in self.model.get_submodule(f"{self._path}.{index}").state_dict().items():
            fused = self._fused[index].get(name)
            found |= {name: tensor} if fused is None else fused.cut(tensor)
        return found

    def block_nbytes(self, index: int) -> int:
        return sum(tensor.nbytes for tensor in self.block(index).values())

    def write(self, index: int, changed: Mapping[str, torch.Tensor]) -> None:
        """Copy pruned tensors (names relative to the block) into the model."""
        _copy_into(self.block(index), changed)

    def write_outside(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Copy pruned tensors outside the blocks (the model's names) into the model."""
        _copy_into(self.model.state_dict(), changed)


# Fields of a configuration that say how large the model is.
_SIZES = re.compile(
    r"(hidden|intermediate|vocab|embd|embed|inner|ffn|expert|head|layer|model|rank|conv|state|block)\w*$|d_\w+$"
)
_OTHERS = re.compile(
    r"token_id|_type|_pdrop|dropout|eps|version|step|length|window|position|max_|chunk"
)


def _check_sizes(folder: Path, config: Any, checkpoint: Checkpoint) -> None:
    """See that no size in the configuration is beyond all that is stored, before a model of that size is made.

    Raises:
        ValueError: names the field.
    """
    numbers = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    for name, value in config.get_text_config().to_dict().items():
        if not isinstance(value, int) or isinstance(value, bool) or _OTHERS.search(name):
            continue
        most = len(checkpoint.tensors) if re.search(r"layers?$", name) else max(numbers, 2**16)
        if _SIZES.search(name) and value > most:
            raise ValueError(
                f"{folder / 'config.json'} asks for {name} = {value:,}, and the checkpoint holds {numbers:,} numbers in "
                f"{len(checkpoint.tensors):,} tensors; config and weights do not belong together"
            )


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors with their names, as stored."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(
            tensors[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
    return digest.hexdigest()


def _copy_into(state: Mapping[str, torch.Tensor], changed: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in changed.items():
            state[name].copy_(tensor)


def _main_dtype(sizes: Mapping[str, tuple[torch.dtype, int]]) -> torch.dtype:
    """The floating-point dtype that most bytes are stored in."""
    totals: dict[torch.dtype, int] = {}
    for dtype, nbytes in sizes.values():
        if dtype.is_floating_point:
            totals[dtype] = totals.get(dtype, 0) + nbytes
    if not totals:
        raise ValueError(
            "the checkpoint holds no floating-point weights; a quantised one cannot be pruned"
        )
    return max(totals, key=lambda dtype: totals[dtype])
