"""The weights of a model, block by block: of a checkpoint on disk, or of a loaded model.

Code that prunes a block does not know which of the two it uses. Every tensor has up to three names:
the stored name in the checkpoint, the name in the transformers model, and for tensors of a block
the name relative to the block. `bind` matches them once.

Outline: `WeightSource` is the interface, `CheckpointSource` reads a folder block by block, and
`ModuleSource` prunes a loaded model in place. `OpenModel` is a source with its skeleton.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import nn

from prunus.model.checkpoint.files import read_limited
from prunus.model.checkpoint.tensor_files import TensorInfo, flat_bytes
from prunus.model.config import EXTRA_BLOCKS
from prunus.model.experts import Fused
from prunus.model.open_folder import OpenFolder
from prunus.model.skeleton import Skeleton, names_in_model


class WeightSource(Protocol):
    """Stored weights of a model, addressed by the names of the model's own parameters.

    Attributes:
        config: The transformers configuration of the model.
        fingerprint: A text that differs for different checkpoints; see `Checkpoint.fingerprint`.
        stored_dtype: The floating-point dtype that most bytes are stored in.
    """

    config: Any
    fingerprint: str
    stored_dtype: torch.dtype

    def bind(self, skeleton: Skeleton) -> None:
        """Match the stored names with those of the model. Comes before all that follows.

        Raises:
            ValueError: Weights are missing, left over, or of another shape.
            NotImplementedError: The weights lack a head, or are stored in a form that prunus cannot
                take apart.
        """

    def read_outside(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Stored tensors outside the blocks, by the model's names.

        Of tied names, only the one that is stored is in the result.
        """

    def block(self, index: int, pinned: bool = False) -> dict[str, torch.Tensor]:
        """Stored tensors of one block on the host, by names relative to the block.

        A CUDA device copies from `pinned` memory while the host continues; see `Checkpoint.read`.
        """

    def block_nbytes(self, index: int) -> int:
        """Bytes of a block as stored."""


class Piece(NamedTuple):
    """Where a piece of a fused tensor is.

    Attributes:
        key: The stored name of the fused tensor.
        fused: How that is cut.
        name: The name of the piece relative to the block.
    """

    key: str
    fused: Fused
    name: str


class CheckpointSource:
    """The weights of a checkpoint folder. It reads the configuration and headers only.

    Weights that are stored in few bits are read as dense ones; see `checkpoint/quantized.py`.

    Args:
        folder: A Hugging Face checkpoint.

    Attributes:
        folder: As given.
        checkpoint: Its open files.
        config: The transformers configuration.
        fingerprint: SHA-256 (hex) over the headers of the files and config.json.
        stored_dtype: The floating-point dtype that most bytes are stored in.
        stored_names: The model's name -> the stored name, of every stored tensor; empty before
            `bind`.
        pieces: The model's name -> where it is, of every piece of a fused tensor.

    Raises:
        FileNotFoundError: The folder, its config.json or one of its shards is missing.
        ValueError: A file is damaged, the configuration does not belong to the weights, or these
            are quantised in a way that prunus does not read.
    """

    def __init__(self, folder: OpenFolder) -> None:
        self.folder = folder
        self.checkpoint = folder.checkpoint
        self.config = folder.config
        fingerprint = self.checkpoint.fingerprint.encode() + (folder.config_bytes or b"")
        self.fingerprint = hashlib.sha256(fingerprint).hexdigest()
        self.stored_dtype = _main_dtype(self.checkpoint.tensors.values())
        self.stored_names: dict[str, str] = {}
        # Per block: relative name -> stored name.
        self._blocks: list[dict[str, str]] = []
        # Per block: stored name of a tensor that is several in the skeleton -> how it is cut.
        self._fused: list[dict[str, Fused]] = []
        self.pieces: dict[str, Piece] = {}
        self._are_equal = functools.cache(self._compare)
        # Stored name of the fused tensor that was read last -> its pieces.
        self._cut: dict[str, dict[str, torch.Tensor]] = {}

    def weight_key(self, module: str) -> str:
        """The name under which the weight of a module is stored.

        A piece of a fused tensor has its name in the model, under which shards store it alone.
        """
        name = f"{module}.weight"
        return name if name in self.pieces else self.stored_names[name]

    def weight_dtype(self, module: str) -> torch.dtype:
        """The dtype in which the weight of a module is stored."""
        key = self.weight_key(module)
        return self.checkpoint.tensors[self.pieces[key].key if key in self.pieces else key].dtype

    def bind(self, skeleton: Skeleton) -> None:
        """Match the stored names with the model's, and check all shapes; see `WeightSource`."""
        self.stored_names, converted, unknown = names_in_model(skeleton, self.checkpoint.tensors)
        stored = self.stored_names
        self._refuse_unknown(skeleton, unknown)
        skeleton.vocabulary_weights.untie(self._are_equal)
        self._check_outside(skeleton)
        expected = skeleton.model.state_dict()
        self._blocks, self._fused = [], []
        for index in range(len(skeleton)):
            prefix = skeleton.block_name(index) + "."
            fused = {
                stored[prefix + tensor.name]: tensor
                for tensor in skeleton.fused(index)
                if prefix + tensor.name in stored
            }
            for key, tensor in fused.items():
                self._check_shape(key, tensor.shape)
            inside = {prefix + name for tensor in fused.values() for name in tensor.members}
            members = [x for x in expected if x.startswith(prefix) and x not in inside]
            for name in members:
                if name not in stored and converted:
                    raise NotImplementedError(
                        f"{name} is stored in another form ({next(iter(converted))!r} and others); "
                        "models whose weights are regrouped in this way when they are loaded "
                        "cannot be pruned yet"
                    )
                if name not in stored:
                    self._refuse_missing(name)
                self._check_shape(stored[name], tuple(expected[name].shape))
            self._blocks.append({name.removeprefix(prefix): stored[name] for name in members})
            self._fused.append(fused)
            for key, tensor in fused.items():
                self.pieces |= {prefix + x: Piece(key, tensor, x) for x in tensor.members}

    def _compare(self, name: str, other: str) -> bool:
        """Whether two names of one parameter have the same numbers, as far as both are stored."""
        keys = [self.stored_names.get(x, "") for x in (name, other)]
        if name == other or not all(keys):
            return True
        infos = [self.checkpoint.tensors[key] for key in keys]
        if infos[0].shape != infos[1].shape:
            return False
        # transformers compares what it has loaded, in one dtype.
        same = infos[0].dtype == infos[1].dtype
        read = self.checkpoint.pieces if same else lambda key: iter([self.checkpoint.whole(key)])
        return all(
            torch.equal(ours.to(self.stored_dtype), theirs.to(self.stored_dtype))
            for ours, theirs in zip(*map(read, keys), strict=True)
        )

    def weight(self, name: str) -> torch.Tensor:
        """The stored tensor of this name in the model, cut out where it is a piece of a fused one.

        What the model lacks has its stored name.
        The last fused tensor stays in memory, because its other pieces come next.
        """
        if (piece := self.pieces.get(name)) is None:
            return self.checkpoint.whole(self.stored_names.get(name, name))
        if piece.key not in self._cut:
            self._cut = {piece.key: piece.fused.cut(self.checkpoint.whole(piece.key))}
        return self._cut[piece.key][piece.name]

    def _refuse_missing(self, name: str) -> NoReturn:
        folder = self.checkpoint.folder
        raise ValueError(f"{folder} holds no weight for {name}; is the checkpoint whole?")

    def _refuse_unknown(self, skeleton: Skeleton, unknown: Mapping[str, str]) -> None:
        """Refuse a matrix in a block that the model has no place for; results would copy it."""
        ignored = getattr(skeleton.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        text, count = self.config.get_text_config(), len(skeleton)
        further = max(getattr(text, name, None) or 0 for name in EXTRA_BLOCKS)
        extra = tuple(f"{skeleton.path}.{count + place}." for place in range(further))
        for name, key in unknown.items():
            if (
                name.startswith(f"{skeleton.path}.")
                # Old checkpoints of GPT-2 and others store masks as attn.bias.
                and name.endswith(".weight")
                and len(self.checkpoint.tensors[key].shape) > 1
                and not any(re.search(rule, name) for rule in ignored)
                and not name.startswith(extra)
            ):
                raise ValueError(
                    f"{self.checkpoint.folder} holds {key!r}, but the model that config.json "
                    f"describes has no such weight in its {len(skeleton)} blocks; config and "
                    "weights do not belong together"
                )

    def _check_outside(self, skeleton: Skeleton) -> None:
        """Embeddings, norms and head must be stored; of tied ones, one name is enough."""
        state = skeleton.model.state_dict(keep_vars=True)
        tied = {id(tensor) for name, tensor in state.items() if name in self.stored_names}
        base = f"{skeleton.model.base_model_prefix}."
        head = [name for name in skeleton.outside_parameter_names if not name.startswith(base)]
        for name in skeleton.outside_parameter_names:
            if name in self.stored_names:
                self._check_shape(self.stored_names[name], tuple(state[name].shape))
            elif id(state[name]) not in tied:
                if name in head and not any(name in self.stored_names for name in head):
                    raise NotImplementedError(
                        f"{self.checkpoint.folder} holds no weight for {name}, nor any other of a "
                        f"head: it is a {skeleton.kind.name} without its head. Save the whole "
                        f"model, as {skeleton.kind.loader} loads it, and prune that"
                    )
                self._refuse_missing(name)

    def _check_shape(self, key: str, expected: tuple[int, ...]) -> None:
        info = self.checkpoint.tensors[key]
        if info.shape != expected:
            raise ValueError(
                f"{key} has shape {info.shape}, but config.json asks for {expected}; config and "
                "weights do not belong together"
            )

    def read_outside(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Stored tensors outside the blocks, by the model's names; see `WeightSource`."""
        keys = {self.stored_names[name]: name for name in names if name in self.stored_names}
        return {keys[key]: tensor for key, tensor in self.checkpoint.read(keys)}

    def block_keys(self, index: int) -> list[str]:
        """Stored names of the tensors of a block, fused ones last."""
        return [*self._blocks[index].values(), *self._fused[index]]

    def block_names(self, index: int) -> tuple[dict[str, str], dict[str, str]]:
        """Relative name -> stored name of a block's tensors; the same of its fused tensors."""
        fused = {tensor.name: key for key, tensor in self._fused[index].items()}
        return dict(self._blocks[index]), fused

    def block(self, index: int, pinned: bool = False) -> dict[str, torch.Tensor]:
        """Stored tensors of one block, by relative name; see `WeightSource`."""
        return self.from_stored(index, self.checkpoint.read(self.block_keys(index), pinned))

    def from_stored(
        self, index: int, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Tensors of a block by relative name, from pairs of stored name and tensor.

        A fused tensor comes as its pieces, which are views of it. A piece that is stored by itself
        has its name in the model.
        """
        names = {key: name for name, key in self._blocks[index].items()}
        names |= {name: piece.name for name, piece in self.pieces.items()}
        by_name: dict[str, torch.Tensor] = {}
        alone = set[str]()  # stored names of fused tensors whose pieces are stored one by one
        for key, tensor in tensors:
            fused = self._fused[index].get(key)
            by_name |= {names[key]: tensor} if fused is None else fused.cut(tensor)
            alone |= {self.pieces[key].key} if key in self.pieces else set()
        # Views of one tensor, as ever: another layout in memory would change the last bits.
        for key in alone:
            by_name |= self._fused[index][key].cut(self._fused[index][key].join(by_name))
        return by_name

    def as_stored(
        self, index: int, tensors: Mapping[str, torch.Tensor], without: Collection[str] = ()
    ) -> dict[str, torch.Tensor]:
        """A block's tensors by stored name, with fused ones joined; undoes `from_stored`.

        Args:
            index: The number of the block.
            tensors: Its tensors by relative name.
            without: Relative names to leave out; a fused tensor is, if all its pieces are.
        """
        plain = {
            key: tensors[name] for name, key in self._blocks[index].items() if name not in without
        }
        return plain | {
            key: fused.join(tensors)
            for key, fused in self._fused[index].items()
            if not set(without).issuperset(fused.members)
        }

    def check_unchanged(self) -> None:
        """Check that all files are still what was opened.

        Raises:
            FileNotFoundError: A file is gone; names it.
            ValueError: A file has changed; names it.
        """
        self.checkpoint.check_unchanged()
        path = self.folder.config_path
        if read_limited(path) != self.folder.config_bytes:
            raise ValueError(
                f"{path} was changed since it was opened. Put the checkpoint back as it was, and "
                "the same command continues"
            )

    def block_nbytes(self, index: int) -> int:
        """Bytes of a block as stored."""
        return self.checkpoint.nbytes(self.block_keys(index))

    @functools.cached_property
    def unused(self) -> dict[str, tuple[int, ...]]:
        """Stored name -> shape of every matrix that the model has no place for.

        Blocks that predict further tokens (MTP) are such. Masks of old checkpoints do not count.
        """
        known = set(self.stored_names.values())
        return {
            key: info.shape
            for key, info in self.checkpoint.tensors.items()
            if key not in known and len(info.shape) > 1 and not key.endswith(".bias")
        }

    def outside_keys(self) -> list[str]:
        """Stored names of everything outside the blocks, sorted."""
        inside = {key for index in range(len(self._blocks)) for key in self.block_keys(index)}
        return sorted(key for key in self.checkpoint.tensors if key not in inside)

    @property
    def shard_count(self) -> int:
        """How many shards a result has: one per block, and one for all else, if there is any."""
        return len(self._blocks) + bool(self.outside_keys())

    def outside_digests(self) -> dict[str, str]:
        """SHA-256 (hex) of every tensor outside the blocks and its name, by stored name.

        Results copy these tensors. So their values are checked on the way.

        Raises:
            ValueError: A value is not finite; names the tensor.
        """
        digests = {}
        for key in self.outside_keys():
            digest = hashlib.sha256(key.encode())
            for piece in self.checkpoint.finite_pieces(key):
                digest.update(flat_bytes(piece).numpy().data)
            digests[key] = digest.hexdigest()
        return digests


class ModuleSource:
    """The weights of a loaded model. Reading returns its own tensors; writing changes them.

    Args:
        model: A transformers model.

    Attributes:
        model: As given.
        config: A copy of its configuration, with the implementation of attention and the
            architecture that the model has.
        fingerprint: Always "in memory".
        stored_dtype: The floating-point dtype that most of its bytes have.

    Raises:
        TypeError: The model is no transformers model.
        ValueError: The model is quantised.
    """

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_input_embeddings"):
            raise TypeError(
                "expected a transformers model or the path of a checkpoint; got "
                f"{type(model).__name__}"
            )
        if getattr(config, "quantization_config", None):
            raise ValueError(
                "the model is quantised; prune it in full precision, then quantise the result"
            )
        self.model = model
        # Copying a configuration drops the attention implementation.
        self.config = copy.deepcopy(config)
        self.config._attn_implementation = config._attn_implementation
        self.config.architectures = [type(model).__name__]
        self.fingerprint = "in memory"
        state = model.state_dict()
        self.stored_dtype = _main_dtype(state.values())
        self._path = ""
        self._fused: list[dict[str, Fused]] = []

    def bind(self, skeleton: Skeleton) -> None:
        """Learn which modules are the blocks, and that the model has all of its head."""
        names = self.model.state_dict().keys()
        if missing := [name for name in skeleton.outside_parameter_names if name not in names]:
            raise NotImplementedError(
                f"a loaded {type(self.model).__name__} has no {missing[0]}, so it is no "
                f"{skeleton.kind.name} with its head: prunus prunes whole models, as "
                f"{skeleton.kind.loader} loads them, not what AutoModel loads or the language "
                "model inside a larger one"
            )
        state = self.model.state_dict(keep_vars=True)
        # The skeleton has a name for each expert, also if the model has one tensor for all of them.
        skeleton.vocabulary_weights.untie(
            lambda a, b: not {a, b} <= state.keys() or state[a] is state[b]
        )
        self._path = skeleton.path
        self._fused = [
            {tensor.name: tensor for tensor in skeleton.fused(i)} for i in range(len(skeleton))
        ]

    def read_outside(self, names: list[str]) -> dict[str, torch.Tensor]:
        """The model's own tensors outside the blocks, by name."""
        state = self.model.state_dict()
        return {name: state[name] for name in names}

    def block(self, index: int, pinned: bool = False) -> dict[str, torch.Tensor]:
        """The model's own tensors of one block, by relative name; `pinned` is not read.

        A fused tensor comes as its pieces, which are views of it.
        """
        by_name: dict[str, torch.Tensor] = {}
        for name, tensor in self.model.get_submodule(f"{self._path}.{index}").state_dict().items():
            fused = self._fused[index].get(name)
            by_name |= {name: tensor} if fused is None else fused.cut(tensor)
        return by_name

    def block_nbytes(self, index: int) -> int:
        """Bytes of a block in memory."""
        return sum(tensor.nbytes for tensor in self.block(index).values())

    @torch.no_grad()
    def write(self, changed: Mapping[str, torch.Tensor], index: int | None = None) -> None:
        """Copy tensors into the model: of block `index` by relative name, others by full name."""
        state = self.model.state_dict() if index is None else self.block(index)
        for name, tensor in changed.items():
            state[name].copy_(tensor)


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hex) of tensors and their names, in the order of the names.

    >>> tensors = {"b": torch.zeros(2), "a": torch.ones(3)}
    >>> tensors_digest(tensors) == tensors_digest(dict(sorted(tensors.items())))
    True
    >>> tensors_digest(tensors) == tensors_digest(tensors | {"a": torch.zeros(3)})
    False
    """
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(flat_bytes(tensors[key]).numpy().data)
    return digest.hexdigest()


def _main_dtype(tensors: Iterable[torch.Tensor | TensorInfo]) -> torch.dtype:
    """The floating-point dtype that most bytes are stored in; a ValueError if there is none."""
    totals: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.nbytes
    if not totals:
        raise ValueError(
            "the checkpoint holds no floating-point weights: give the model in bfloat16, float16 "
            "or float32"
        )
    return max(totals, key=totals.__getitem__)


#: The weights of a model, stored or loaded, block by block.
Readable = CheckpointSource | ModuleSource


def bound_skeleton(
    source: Readable,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
) -> Skeleton:
    """The model of a source without weights, whose names are matched with the stored ones.

    Args:
        source: The weights.
        trust_remote_code: Let transformers run code that comes with the checkpoint.
        dtype: Dtype of the computation; None for the stored one.
    """
    skeleton = Skeleton(source.config, dtype or source.stored_dtype, trust_remote_code)
    source.bind(skeleton)
    return skeleton


def open_weights(
    model: OpenFolder | nn.Module, trust_remote_code: bool
) -> tuple[Readable, Skeleton]:
    """The weights of a model, stored or loaded, and the model without weights."""
    source: Readable = (
        ModuleSource(model) if isinstance(model, nn.Module) else CheckpointSource(model)
    )
    return source, bound_skeleton(source, trust_remote_code)


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A model that can be read, before a run decides anything about it.

    Attributes:
        name: The model as the user named it; the class name of a loaded model.
        source: The dense weights.
        skeleton: The model without weights: in its stored dtype, or in that of the computation if
            a plan has chosen one.
        device: Where blocks run.
    """

    name: str
    source: Readable
    skeleton: Skeleton
    device: torch.device

    @property
    def checkpoint(self) -> CheckpointSource:
        """The source of a run that reads a checkpoint.

        Raises:
            TypeError: The run changes a loaded model.
        """
        if isinstance(self.source, ModuleSource):
            raise TypeError(f"{self.name} is a loaded model, which has no checkpoint")
        return self.source

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights of the source in its files; 0 for a loaded model, which has none."""
        if isinstance(self.source, ModuleSource):
            return 0
        return self.source.checkpoint.nbytes(self.source.checkpoint.tensors)
