"""Perplexity of a model that does not fit in memory: all windows through one block before the next is read.

The same blocks are called with the same arguments as by the whole model, so the figure is the same. Embeddings,
blocks and head are read from the checkpoint once each; between blocks the hidden states of all windows wait in memory,
or in a nameless file where they do not fit beside a block.

Legend: W windows, B windows at once, S tokens per window.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.evaluation.loss import ROWS, window_loss
from prunus.hardware.memory import memory_budget, resident_memory
from prunus.model.adapter import is_adapter
from prunus.model.checkpoint.atomic_files import read_json
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.dtypes import DTYPES
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, load_config
from prunus.model.stream import Stream

__all__ = ["StreamedModel", "streams", "whole_model_bytes"]

Progress = Callable[[int, int], None]


def whole_model_bytes(
    checkpoint: Checkpoint, config: Any, dtype: torch.dtype | None, tokens: int
) -> int:
    """What scoring with the whole model takes, in bytes: its weights in `dtype` (None: as stored), logits of `tokens`."""
    weights = 0
    for info in checkpoint.tensors.values():
        changes = dtype is not None and info.dtype.is_floating_point
        weights += math.prod(info.shape) * (dtype if changes and dtype else info.dtype).itemsize
    return weights + _logits_bytes(config, tokens, (dtype or torch.float32).itemsize)


def _logits_bytes(config: Any, tokens: int, size: int) -> int:
    """Logits as the model gives them, and those of `ROWS` tokens in float32 with their log-probabilities."""
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 0)
    return vocabulary * (tokens * size + min(tokens, ROWS) * 8)


def streams(
    folder: Path,
    stream: bool | None,
    memory: int | None,
    dtype: str,
    place: torch.device,
    tokens: int,
    trust_remote_code: bool,
) -> bool:
    """Whether a checkpoint is scored block by block: as `stream` says, or else where the whole model does not fit.

    `tokens` are in flight at once; the other arguments are those of `perplexity`.

    Raises:
        ValueError: `stream` asks for it, and the model is packed or an adapter.
    """
    if stream is False:
        return False
    whole_only = _whole_only(folder)
    if whole_only is not None:
        if stream:
            raise ValueError(
                f"{folder} {whole_only} is scored with the whole model in memory; leave --stream out"
            )
        return False
    if stream:
        return True
    try:
        checkpoint, config = Checkpoint(folder), load_config(folder, trust_remote_code)
    except (ValueError, FileNotFoundError):
        return (
            False  # transformers may know more forms; what is wrong is said when it loads the model
        )
    need = whole_model_bytes(checkpoint, config, DTYPES.get(dtype), tokens)
    return need + (resident_memory() if place.type == "cpu" else 0) > memory_budget(place, memory)


def _whole_only(folder: Path) -> str | None:
    """What kind of model it is, if it is one that cannot be taken block by block from its checkpoint."""
    if is_adapter(folder):
        return "is an adapter, which"
    config = read_json(folder / "config.json")
    packed = isinstance(config, dict) and config.get("quantization_config")
    return "is packed or quantised, which" if packed else None


@dataclass(frozen=True)
class StreamedModel:
    """A checkpoint to be scored block by block. `open` makes one; nothing but headers is read until `losses`.

    Attributes:
        source, skeleton: weights, and the model without them in the dtype of the computation.
        device: where blocks run.
        budget: bytes that may be taken beside what the process has.
    """

    source: CheckpointSource
    skeleton: Skeleton
    device: torch.device
    budget: int

    @classmethod
    def open(
        cls,
        folder: Path,
        dtype: str,
        device: torch.device,
        memory: int | None,
        trust_remote_code: bool,
    ) -> StreamedModel:
        """Bind a checkpoint folder to its skeleton.

        Args:
            folder: an ordinary checkpoint, neither packed nor an adapter.
            dtype: auto (as transformers would load it) or a name of `DTYPES`.
            device: where blocks run.
            memory: budget in bytes for the whole process; None for what is free.
            trust_remote_code: run model code that comes with the checkpoint.

        Raises:
            ValueError, FileNotFoundError, NotImplementedError: see `CheckpointSource` and `Skeleton`.
        """
        source = CheckpointSource(folder, trust_remote_code)
        own = getattr(source.config, "dtype", None)
        chosen = DTYPES.get(dtype) or (own if isinstance(own, torch.dtype) else source.stored_dtype)
        skeleton = Skeleton(source.config, chosen, trust_remote_code)
        source.bind(skeleton)
        budget = memory_budget(device, memory)
        return cls(
            source, skeleton, device, budget - (resident_memory() if device.type == "cpu" else 0)
        )

    def losses(
        self, ids: torch.Tensor, batch: int, progress: Progress | None = None
    ) -> list[float]:
        """The mean next-token cross entropy of every window, in nats per token.

        Args:
            ids: (W, S) int64.
            batch: B; as many windows go through a block at once.
            progress: called after every block with the share done, in windows, and W.

        Raises:
            ValueError: the budget does not hold a block; hidden states that are not finite, with the block's name.
            NotImplementedError: see `Stream`.
        """
        batches = ids.split(batch)
        least, hidden = self._needs(batch, ids.shape)
        if least > self.budget:
            raise ValueError(
                f"scoring block by block needs {(least + resident_memory()) / 1e9:.2f} GB with {batch} windows of "
                f"{ids.shape[1]} tokens in flight; the memory budget is "
                f"{(self.budget + resident_memory()) / 1e9:.2f} GB. Raise --memory, or lower --batch or --seqlen"
            )
        spill_to = Path(tempfile.gettempdir()) if least + hidden > self.budget else None
        stream = Stream(self.skeleton, self.source, self.device)
        steps = len(self.skeleton) + 1
        found: list[float] = []
        with torch.no_grad(), contextlib.closing(stream):
            stream.embed(batches, spill_to, on_device=True)
            for index in range(len(self.skeleton)):
                stream.propagate(index, self.source.block(index))
                self._check_finite(index, stream)
                if progress is not None:
                    progress(len(ids) * (index + 1) // steps, len(ids))
            with self.skeleton.outside_blocks(
                self.source.outer, self.device, with_head=True, with_embedding=False
            ):
                for position, ids_BS in enumerate(batches):
                    hidden_BSH = stream.states.get(position)
                    for window, ids_S in enumerate(ids_BS.to(self.device)):
                        states = hidden_BSH[window : window + 1]

                        def rows(
                            first: int, stop: int, states: torch.Tensor = states, ids: Any = ids_S
                        ) -> Any:
                            return self.skeleton.logits(
                                ids[None, first:stop], states[:, first:stop]
                            )[0]

                        found.append(window_loss(rows, ids_S, len(found)))
            if progress is not None:
                progress(len(ids), len(ids))
        return found

    def _check_finite(self, index: int, stream: Stream) -> None:
        """Look at the first batch: what is wrong with a block is wrong with all, and hours may lie before the end."""
        if not all(x.isfinite() for x in torch.aminmax(stream.states.get(0))):
            raise ValueError(
                f"{self.skeleton.block_name(index)} gives hidden states that are not finite. "
                "Damaged weights, or a dtype too small for this model; try --dtype float32"
            )

    def _needs(self, batch: int, shape: torch.Size) -> tuple[int, int]:
        """Bytes for the largest step with one batch in flight, and for the hidden states of all windows."""
        skeleton, size = self.skeleton, self.skeleton.dtype.itemsize
        windows, seqlen = shape
        config = self.source.config.get_text_config()
        hidden = int(getattr(config, "hidden_size", 0) or skeleton.linears(0)[0].shape[1])
        blocks = [sum(p.numel() for p in block.parameters()) * size for block in skeleton.blocks]
        # A block as it is mapped from the file, and its copy in the dtype of the computation.
        block = max(b + self.source.block_nbytes(i) for i, b in enumerate(blocks))
        widest = max(max(linear.shape) for linear in skeleton.linears(0))
        transient = batch * seqlen * (6 * hidden + 3 * widest) * size
        outer = self.source.checkpoint.nbytes(self.source.outside_keys())
        head = skeleton.model.get_output_embeddings()
        embedding = skeleton.model.get_input_embeddings().weight
        if head is not None and head.weight is not embedding:
            outer -= min(head.weight.numel(), embedding.numel()) * self.source.stored_dtype.itemsize
        # Mapped while it is copied; the logits come when only the copy is left.
        copy = outer * max(1, size // self.source.stored_dtype.itemsize)
        logits = _logits_bytes(config, min(ROWS, seqlen), size)
        return max(block + transient, outer + copy, copy + logits), windows * seqlen * hidden * size
