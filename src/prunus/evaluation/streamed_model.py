"""The logits of a model that does not fit in memory, which is read block by block.

All windows pass through one block before the next block is read. The blocks are called with the
same arguments as in the whole model, so the perplexity is the same. Between two blocks the hidden
states of all windows are kept in memory, or in an unnamed temporary file if they do not fit.

Legend: W windows, B windows at once, S tokens per window, H hidden size.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path

import torch

from prunus.engine.block_memory import transient_bytes
from prunus.evaluation.model_input import ComputeOptions
from prunus.evaluation.window_scores import ROWS, Rows, WindowProgress
from prunus.hardware.machine import (
    ROOM_TO_KEEP,
    available_memory,
    keep_freed_memory,
    memory_budget,
    process_memory,
)
from prunus.model.device import DTYPES
from prunus.model.open_folder import OpenFolder
from prunus.model.source import CheckpointSource, bound_skeleton
from prunus.model.stream import HiddenStates, StatesPlace, Stream


def choose_streamed(
    folders: Sequence[OpenFolder | None], stream: bool | None, tokens: int, options: ComputeOptions
) -> list[bool]:
    """Decide for models that are in memory together which are read block by block.

    Loaded models, adapters and checkpoints that prunus does not expand itself are never streamed.
    If whole models on a CPU leave room, the process keeps the memory that it frees from here on;
    see `keep_freed_memory`.

    Args:
        folders: The folders of the models; None for a loaded one.
        stream: What the user chose; None streams if the whole models do not fit in memory.
        tokens: Tokens in one forward pass, for the memory of logits.
        options: How the models are computed.

    Returns:
        For each model, whether it is streamed.

    Raises:
        ValueError: `stream` is True, and a model cannot be streamed.
    """
    if stream is False:
        return [False] * len(folders)
    reasons = ["" if folder is None else whole_only(folder) for folder in folders]
    can_stream = [reason is None for reason in reasons]
    if stream:
        for folder, reason in zip(folders, reasons, strict=True):
            if folder is not None and reason:
                raise ValueError(
                    f"{folder.path} {reason} is scored with the whole model in memory; leave "
                    "`stream` out"
                )
        return can_stream
    need = process_memory() if options.device.type == "cpu" else 0
    for position, folder in enumerate(folders):
        try:
            need += 0 if folder is None else whole_bytes(folder, tokens, options)
        except (ValueError, FileNotFoundError):
            # transformers may know other formats. If something is wrong, loading the model will
            # say so.
            can_stream[position] = False
    budget = memory_budget(options.device, options.memory)
    if options.device.type == "cpu" and need <= ROOM_TO_KEEP * budget:
        keep_freed_memory()
    fits = need <= budget
    return [reads and not fits for reads in can_stream]


def whole_bytes(folder: OpenFolder, tokens: int, options: ComputeOptions) -> int:
    """Memory in bytes of a whole model: weights, and logits of `tokens`."""
    stored = sum(path.stat().st_size for path in folder.path.glob("*.safetensors"))
    # Quantised weights keep their stored form in memory.
    quantized = whole_only(folder) is not None
    dtype = DTYPES.get(options.dtype)
    logits = _logits_bytes(
        folder.vocabulary or 0,
        tokens,
        (torch.float32 if quantized or dtype is None else dtype).itemsize,
    )
    if quantized:
        return stored + logits
    for info in folder.checkpoint.tensors.values():
        loaded = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
        logits += math.prod(info.shape) * loaded.itemsize
    return logits


def _logits_bytes(vocabulary: int, tokens: int, size: int) -> int:
    """Bytes of the logits of `tokens` as the model returns them, `size` bytes each, and of `ROWS`
    rows in float32 with their log-probabilities."""
    return vocabulary * (tokens * size + min(tokens, ROWS) * 8)


def whole_only(folder: OpenFolder) -> str | None:
    """Why a model cannot be read block by block, as the start of a clause; None if it can."""
    return "is quantised, which" if folder.is_foreign else None


class StreamedModel:
    """An ordinary checkpoint that is scored block by block, a `LogitsSource`.

    The constructor reads headers only.

    Args:
        folder: The checkpoint.
        options: How the model is computed.

    Attributes:
        source: The weights.
        skeleton: The model without weights.
        model: Its transformers model.
        dtype: The dtype in which it computes.
        device: Where it computes.
        memory: Budget in bytes for the whole process; None takes what is free.

    Raises:
        ValueError, FileNotFoundError: The checkpoint is damaged.
        NotImplementedError: The model is not a row of blocks.
    """

    def __init__(self, folder: OpenFolder, options: ComputeOptions) -> None:
        self.source = CheckpointSource(folder)
        default = getattr(self.source.config, "dtype", None)
        default = default if isinstance(default, torch.dtype) else self.source.stored_dtype
        self.dtype = DTYPES.get(options.dtype, default)
        self.skeleton = bound_skeleton(self.source, folder.trust_remote_code, self.dtype)
        self.model = self.skeleton.model
        self.device = options.device
        self.memory = options.memory

    def windows(
        self, ids: torch.Tensor, batch: int, progress: WindowProgress, models: int
    ) -> Generator[Rows, None, None]:
        """The logits of every window; see `LogitsSource`.

        Until the last one is taken, memory holds the head and all hidden states.

        Raises:
            ValueError: A block with its activations does not fit in the memory budget.
        """
        if not len(ids):
            return
        with contextlib.ExitStack() as stack:
            states = self._run_blocks(ids, batch, progress, models)
            stack.callback(states.close)
            # The mode ends before a window is handed out, so it never holds for the caller.
            with torch.no_grad():
                stack.enter_context(
                    self.skeleton.outside_blocks(
                        self.source.read_outside, self.device, with_head=True
                    )
                )
            for position, ids_BS in enumerate(ids.split(batch)):
                ids_BS = ids_BS.to(self.device)
                for ids_S, hidden_SH in zip(ids_BS, states.get(position), strict=True):
                    yield partial(self._rows, ids_S, hidden_SH)
            progress(len(ids), len(ids))

    def _run_blocks(
        self, ids: torch.Tensor, batch: int, progress: WindowProgress, models: int
    ) -> HiddenStates:
        """What the last block returns, (B, S, H) per batch. The caller closes it."""
        batches = ids.split(batch)
        storage = self._place_states(batch, ids.shape, models)
        stream = Stream(self.skeleton, self.source, self.device)
        steps = len(self.skeleton) + 1
        try:
            with torch.no_grad():
                stream.embed(batches, storage.spill_to, on_device=storage.on_device)
                for index in range(len(self.skeleton)):
                    stream.propagate(index, self.source.block(index))
                    progress(len(ids) * (index + 1) // steps, len(ids))
        except BaseException:
            stream.close()
            raise
        return stream.states

    def _rows(
        self, ids_S: torch.Tensor, hidden_SH: torch.Tensor, first: int, stop: int
    ) -> torch.Tensor:
        """The logits (T, V) of some rows of one window: a `Rows`."""
        return self.skeleton.logits(ids_S[None, first:stop], hidden_SH[None, first:stop])[0]

    def _place_states(self, batch: int, shape: torch.Size, models: int) -> StatesPlace:
        """Where the hidden states of all windows are kept between blocks, if a block fits.

        It is the device if they fit there, else the memory of the host, else a file.
        """
        held = process_memory() if self.device.type == "cpu" else 0
        budget = memory_budget(self.device, self.memory) - held
        minimum, hidden = self._needs(batch, shape, models)
        if minimum > budget:
            held = process_memory()
            raise ValueError(
                f"scoring block by block needs {(minimum + held) / 1e9:.2f} GB with one batch "
                f"of windows in flight ({batch} × {shape[1]} tokens); the memory budget is "
                f"{(budget + held) / 1e9:.2f} GB. Raise `memory`, or lower `batch` or `seqlen`"
            )
        if minimum + models * hidden <= budget:
            return StatesPlace(None, on_device=True)
        if self.device.type != "cpu":
            host = available_memory() if self.memory is None else self.memory - process_memory()
            if models * hidden <= host:
                return StatesPlace(None, on_device=False)
        return StatesPlace(Path(tempfile.gettempdir()), on_device=True)

    def _needs(self, batch: int, shape: torch.Size, models: int) -> tuple[int, int]:
        """Bytes for the largest step with one batch in flight, and for all hidden states.

        The step is a block with its activations, loading the weights outside the blocks, or logits.
        The heads of the other `models` are in memory with it, and logits of two at once.
        """
        skeleton = self.skeleton
        size = skeleton.dtype.itemsize
        windows, seqlen = shape
        config = self.source.config.get_text_config()
        hidden = int(getattr(config, "hidden_size", 0) or skeleton.linears(0)[0].shape[1])
        blocks = [sum(p.numel() for p in block.parameters()) * size for block in skeleton.blocks]
        # A block takes memory as it is stored, and in the dtype of the computation.
        block = max(b + self.source.block_nbytes(i) for i, b in enumerate(blocks))
        widest = max(max(linear.shape) for linear in skeleton.linears(0))
        transient = transient_bytes(batch * seqlen, hidden, widest, size)
        outer = self.source.checkpoint.nbytes(self.source.outside_keys())
        weights = skeleton.vocabulary_weights
        if (head := weights.own_head) is not None:
            least = min(head.parameter.numel(), weights.embedding.parameter.numel())
            outer -= least * self.source.stored_dtype.itemsize
        # Of what is outside the blocks, only the copy is left when logits are computed.
        copy = outer * max(1, size // self.source.stored_dtype.itemsize)
        logits = _logits_bytes(skeleton.vocabulary_weights.rows, min(ROWS, seqlen), size)
        logits *= min(models, 2)
        step = max(block + transient, outer + copy, copy + logits)
        return (models - 1) * copy + step, windows * seqlen * hidden * size
