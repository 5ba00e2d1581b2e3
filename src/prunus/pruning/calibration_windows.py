"""The calibration windows of a run: text or ids from the source that the recipe names, through the tokenizer.

Of an image classifier the windows are images from a folder, through its image processor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prunus.calibration import Windows, hash_ids, load_windows
from prunus.calibration.images import draw_images, hash_pixels, read_images
from prunus.model.image_processor import load_image_processor
from prunus.model.kinds import IMAGES
from prunus.model.loading import load_model
from prunus.model.source import ModuleSource
from prunus.model.tokenizer import load_tokenizer
from prunus.pruning.job import PruningJob

__all__ = ["calibration_windows", "described"]


def described(given: torch.Tensor) -> dict[str, Any]:
    """What a recipe says of token ids or pixel values that are given instead of a source.

    Raises:
        ValueError: they are neither.
    """
    shape, is_float = tuple(given.shape), given.dtype.is_floating_point
    if given.numel() and len(shape) == 4 and is_float:
        return {"calibration": "pixel values", "samples": shape[0]}
    if given.numel() and len(shape) == 2 and not is_float:
        return {"calibration": "token ids", "samples": shape[0], "seqlen": shape[1]}
    raise ValueError(
        f"calibration ids must be integers (samples, seqlen), got {given.dtype} {shape}; pixel values of images are "
        "floats (samples, channels, height, width)"
    )


def calibration_windows(job: PruningJob) -> Windows:
    """The calibration windows of a run; none where the method does not look at inputs.

    Raises:
        ValueError: no tokenizer, or token ids that the model's embedding does not have.
    """
    recipe, options = job.recipe, job.options
    if not job.needs_inputs:
        nothing = torch.zeros((0, recipe.seqlen), dtype=torch.int64)
        return Windows(nothing, "none: the method looks at weights only", hash_ids(nothing))
    if job.skeleton.kind is IMAGES:
        return _images(job)
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


def _images(job: PruningJob) -> Windows:
    recipe, pixels = job.recipe, job.options.input_ids
    if pixels is None:
        processor = job.options.tokenizer
        if processor is None:
            if isinstance(job.source, ModuleSource):
                raise ValueError(
                    "pruning a loaded image classifier needs its image processor: pass tokenizer=, or pixel values as "
                    "calibration="
                )
            processor = load_image_processor(
                job.source.checkpoint.folder, job.options.trust_remote_code
            )
        pixels = read_images(
            draw_images(Path(recipe.calibration), recipe.samples, recipe.seed), processor
        )
        source = f"{recipe.calibration}: {len(pixels)} images at random"
    else:
        pixels, source = (
            pixels.detach().to("cpu", torch.float32),
            "pixel values given by the caller",
        )
    channels = job.skeleton.model.config.num_channels
    if pixels.dim() != 4 or pixels.shape[1] != channels:
        raise ValueError(
            f"the model takes images of {channels} channels, got pixel values {tuple(pixels.shape)}; the image processor "
            "belongs to another model"
        )
    return Windows(pixels, source, hash_pixels(pixels))


def _tokenizer(job: PruningJob) -> Any:
    if job.options.tokenizer is not None or job.recipe.calibration.endswith(".safetensors"):
        return job.options.tokenizer
    if isinstance(job.source, ModuleSource):
        raise ValueError(
            "pruning a loaded model needs its tokenizer: pass tokenizer=, or token ids as calibration="
        )
    return load_tokenizer(job.source.checkpoint.folder, job.options.trust_remote_code)


def _load_whole(job: PruningJob) -> Any:
    """The dense model in memory, to let it write its own calibration text."""
    if isinstance(job.source, ModuleSource):
        return job.source.model
    folder = job.source.checkpoint.folder
    return load_model(folder, job.dtype, job.options.trust_remote_code).to(job.device)
