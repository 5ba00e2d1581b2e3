"""A model that is open for a run: its weights, and its skeleton."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from prunus.engine.run_options import RunOptions
from prunus.engine.session import Session
from prunus.model.checkpoint.output_folder import check_companions
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.device import choose_device
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, ModuleSource, bound_skeleton


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
    source: CheckpointSource | ModuleSource
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


def open_model(model: str | Path | nn.Module, options: RunOptions, session: Session) -> OpenModel:
    """Open a model for a run. No weights are read.

    Args:
        model: A checkpoint folder, a hub id, or a loaded model.
        options: The options that only decide how the work is done.
        session: Who hears of a download.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, OSError: The model cannot be read, or
            has no blocks that prunus knows.
    """
    trust = options.trust_remote_code
    loaded = model if isinstance(model, nn.Module) else None
    device = choose_device(options.device, loaded)
    source: CheckpointSource | ModuleSource
    if isinstance(model, nn.Module):
        source, name = ModuleSource(model), type(model).__name__
    else:
        source = CheckpointSource(open_folder(model, trust, session.tell))
        name = str(model)
        check_companions(source.checkpoint.folder, trust)
    skeleton = bound_skeleton(source, trust)
    return OpenModel(name=name, source=source, skeleton=skeleton, device=device)
