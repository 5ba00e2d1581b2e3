"""A whole model in memory, with its tokenizer; saved again, it keeps its card and its record.

Outline: `load` is the public call, `load_model` the part that reads weights. `_ReadFile` makes
transformers read files rather than map them. `card.py` has what is saved with it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prunus.hardware.numerics import check_finite
from prunus.hardware.process_state import replaced
from prunus.model.checkpoint.card import keep_records, records_of
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.checkpoint.tensor_files import DTYPE_CODES, Checkpoint
from prunus.model.device import choose_device
from prunus.model.kinds import IMAGES
from prunus.model.meta_model import build_on_meta
from prunus.model.open_folder import OpenFolder
from prunus.model.tokenizer import load_image_processor, load_tokenizer
from prunus.words import reason


class LoadedModel(NamedTuple):
    """A model in memory and what makes its inputs: `model, tokenizer = load(path)`.

    Attributes:
        model: A transformers model in evaluation mode.
        tokenizer: Its tokenizer; for an image classifier its image processor.
    """

    model: Any
    tokenizer: Any


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load any model that prunus reads or writes: dense, pruned, compressed.

    A compressed model is unpacked. Where prunus wrote the checkpoint, the model's `save_pretrained`
    keeps its model card and its record.

    Args:
        model: Folder of a checkpoint, or a hub id.
        dtype: Of the weights and the computation, as a torch dtype or its name; "auto" is that of
            the checkpoint.
        device: auto, cpu, cuda or cuda:i; auto takes a CUDA device if there is one.
        trust_remote_code: Run the model code of the checkpoint.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        FileNotFoundError: There is no such folder, and no such model on the hub.
        ValueError: A file is damaged or missing, or there is no such device.
        NotImplementedError: The model is of a kind that prunus does not support.
        OSError: A file cannot be read, or the hub cannot be reached.
    """
    target = choose_device(device)
    folder = open_folder(model, trust_remote_code)
    read = load_image_processor if folder.kind is IMAGES else load_tokenizer
    # The tokenizer comes first: what is wrong with it shows before the weights are read.
    tokenizer = read(folder)
    loaded = load_model(folder, dtype)
    keep_records(loaded, records_of(folder.path))
    return LoadedModel(loaded.to(target), tokenizer)


def load_model(
    folder: OpenFolder, dtype: str | torch.dtype = "auto", attention: str | None = None
) -> Any:
    """The model of a checkpoint, in evaluation mode; safetensors only.

    Args:
        folder: A checkpoint.
        dtype: Dtype of weights and computation, or its name; "auto" is that of the checkpoint.
        attention: One of transformers' implementations, which agree up to rounding; None for the
            default of transformers.

    Raises:
        ValueError: The model cannot be loaded, some of its weights are missing, or its
            configuration describes a model far larger than its weights.
        NotImplementedError: It is of a kind that prunus does not support.
        FileNotFoundError: A file is missing.
    """
    import transformers

    path, config, kind = folder.path, folder.config, folder.kind
    # A model beyond all limits ends here, before transformers makes it.
    build_on_meta(kind, config, torch.float32, folder.trust_remote_code)
    checkpoint = folder.stored_checkpoint if folder.is_foreign else folder.checkpoint
    # Else transformers would look for the parts of quantised weights.
    dense = {"config": config} if type(checkpoint) is not Checkpoint else {}
    opened = partial(_ReadFile, checkpoint)
    try:
        with replaced(transformers.modeling_utils, "safe_open", opened):
            model, loaded = getattr(transformers, kind.loader).from_pretrained(
                path,
                **dense,
                output_loading_info=True,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=folder.trust_remote_code,
                attn_implementation=attention,
            )
    except Exception as error:  # transformers raises errors of many kinds for missing or bad files
        raise ValueError(f"{path}: the model could not be loaded ({reason(error)})") from error
    # transformers only warns of weights that it does not find, and fills them with random numbers.
    for what, problem in {"missing": "not there", "mismatched": "of another shape"}.items():
        if names := sorted(str(key) for key in loaded.get(f"{what}_keys") or ()):
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            raise ValueError(
                f"{path}: the model could not be loaded: {len(names)} of its weights are "
                f"{problem} ({shown}); is the checkpoint whole, and is config.json its own?"
            )
    check_finite(dict(model.named_parameters()), f"{path}: ")
    return model.eval()


class _StoredWeight:
    """A tensor that transformers reads by `weight[...]` when its turn comes, as in safetensors."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, index: Any) -> Any:
        # A view would keep what was read in memory when the data of the weight are replaced.
        return self._checkpoint.whole(self._name)[index].data

    def get_shape(self) -> list[int]:
        return list(self._checkpoint.tensors[self._name].shape)

    def get_dtype(self) -> str:
        return DTYPE_CODES[self._checkpoint.tensors[self._name].dtype]


class _ReadFile:
    """A `safe_open` of one shard, whose quantised weights are dense, that maps no file.

    transformers would map the files, and a mapped file that is cut short ends the process that
    touches it. Its option `disable_mmap` holds whole files in memory next to their tensors.
    """

    def __init__(self, checkpoint: Checkpoint, path: Any, **_: Any) -> None:
        self._checkpoint, self._file = checkpoint, Path(path).name

    def keys(self) -> list[str]:
        infos = self._checkpoint.tensors.items()
        return [name for name, info in infos if info.file == self._file]

    def metadata(self) -> dict[str, str]:
        return self._checkpoint.metadata

    def get_slice(self, name: str) -> _StoredWeight:
        return _StoredWeight(self._checkpoint, name)

    def __enter__(self) -> _ReadFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass
