"""The calibration windows of a run: text or ids from the source that the recipe names, through the tokenizer."""

from __future__ import annotations

from typing import Any

import torch

from prunus.calibration import Windows, hash_ids, load_windows
from prunus.model.loading import load_model
from prunus.model.source import ModuleSource
from prunus.model.tokenizer import load_tokenizer
from prunus.plan import Job

__all__ = ["calibration_windows"]


def calibration_windows(job: Job) -> Windows:
    """The calibration windows of a run; none where the method does not look at inputs.

    Raises:
        ValueError: no tokenizer, or token ids that the model's embedding does not have.
    """
    recipe, options = job.recipe, job.options
    if not job.needs_inputs:
        nothing = torch.zeros((0, recipe.seqlen), dtype=torch.int64)
        return Windows(nothing, "none: the method looks at weights only", hash_ids(nothing))
    if options.input_ids is not None:
        ids = options.input_ids.detach().to("cpu", torch.int64)
        windows = Windows(ids, "token ids given by the caller", hash_ids(ids))
    else:
        windows = load_windows(
            recipe.calibration,
            tokenizer=_tokenizer(job),
            samples=recipe.samples,
            seqlen=recipe.seqlen,
            seed=recipe.seed,
            data_dir=options.data_dir,
            model=lambda: _load_whole(job),
        )
    rows = job.skeleton.model.get_input_embeddings().weight.shape[0]
    largest, smallest = int(windows.ids.max()), int(windows.ids.min())
    if smallest < 0 or largest >= rows:
        raise ValueError(
            f"the calibration token ids run from {smallest} to {largest}, but the model's embedding has {rows} rows: "
            "the tokenizer or the file of ids belongs to another model"
        )
    return windows


def _tokenizer(job: Job) -> Any:
    if job.options.tokenizer is not None or job.recipe.calibration.endswith(".safetensors"):
        return job.options.tokenizer
    if isinstance(job.source, ModuleSource):
        raise ValueError(
            "pruning a loaded model needs its tokenizer: pass tokenizer=, or token ids as calibration="
        )
    return load_tokenizer(job.source.checkpoint.folder, job.options.trust_remote_code)


def _load_whole(job: Job) -> Any:
    """The dense model in memory, to let it write its own calibration text."""
    if isinstance(job.source, ModuleSource):
        return job.source.model
    folder = job.source.checkpoint.folder
    return load_model(folder, job.dtype, job.options.trust_remote_code).to(job.device)
