"""The calibration windows of a run: from the source that its recipe names, or given by the caller.

For a language model a window is `seqlen` token ids. For an image classifier it is one image.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from prunus.calibration import Windows, hash_ids, load_windows
from prunus.calibration.images import draw_images, hash_pixels, read_images
from prunus.calibration.texts import are_texts, windows_from_texts
from prunus.model.chat_template import apply_chat_template
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.image_processor import load_image_processor
from prunus.model.kinds import IMAGES
from prunus.model.loading import load_model
from prunus.model.source import ModuleSource
from prunus.model.tokenizer import load_tokenizer
from prunus.pruning.job import PruningJob
from prunus.pruning.manifest import RunInputs

__all__ = ["calibration_windows", "describe_given", "run_inputs"]


def describe_given(given: Any) -> dict[str, Any]:
    """The options of a recipe that describe the calibration data of the caller.

    >>> describe_given(torch.zeros(8, 512, dtype=torch.int64))
    {'calibration': 'token ids', 'samples': 8, 'seqlen': 512}
    >>> describe_given(["one text", "another"])
    {'calibration': 'texts'}
    >>> describe_given("c4")
    {'calibration': 'c4'}

    Args:
        given: The name of a source, texts, integers (samples, seqlen), or floats (samples,
            channels, height, width).

    Raises:
        ValueError: A tensor is neither token ids nor pixel values.
        TypeError: It is something else.
    """
    if are_texts(given):
        return {"calibration": "texts"}
    if not isinstance(given, torch.Tensor):
        return {"calibration": None if given is None else str(given)}
    shape, is_float = tuple(given.shape), given.dtype.is_floating_point
    if given.numel() and len(shape) == 4 and is_float:
        return {"calibration": "pixel values", "samples": shape[0]}
    if given.numel() and len(shape) == 2 and not is_float:
        return {"calibration": "token ids", "samples": shape[0], "seqlen": shape[1]}
    raise ValueError(
        f"calibration ids must be integers (samples, seqlen), got {given.dtype} {shape}; pixel "
        "values of images are floats (samples, channels, height, width)"
    )


def calibration_windows(job: PruningJob) -> Windows:
    """The calibration windows of a run; none if nothing in the run looks at inputs.

    Raises:
        ValueError: There is no tokenizer, or the embedding lacks some of the token ids.
    """
    recipe = job.recipe
    if not job.needs_inputs:
        nothing = torch.zeros((0, recipe.seqlen), dtype=torch.int64)
        return Windows(nothing, "none: the method looks at weights only", hash_ids(nothing))
    if job.skeleton.kind is IMAGES:
        return _images(job)
    if job.options.input_ids is not None:
        ids = job.options.input_ids.detach().to("cpu", torch.int64)
        windows = Windows(ids, "token ids given by the caller", hash_ids(ids))
    elif job.options.texts is not None:
        windows = windows_from_texts(
            job.options.texts,
            _tokenizer(job),
            samples=recipe.samples,
            seqlen=recipe.seqlen,
            seed=recipe.seed,
            bos=recipe.bos,
            chat_text=functools.partial(apply_chat_template, answer_follows=False),
        )
    else:
        windows = load_windows(
            recipe.calibration,
            tokenizer=_tokenizer(job),
            samples=recipe.samples,
            seqlen=recipe.seqlen,
            seed=recipe.seed,
            data_dir=job.options.data_dir,
            model=lambda: _dense_model(job),
            bos=recipe.bos,
        )
    rows = job.skeleton.model.get_input_embeddings().weight.shape[0]
    largest, smallest = int(windows.ids.max()), int(windows.ids.min())
    if smallest < 0 or largest >= rows:
        raise ValueError(
            f"the calibration token ids run from {smallest} to {largest}, but the model's "
            f"embedding has {rows} rows: the tokenizer or the file of ids belongs to another model"
        )
    return windows


def run_inputs(job: PruningJob, windows: Windows) -> RunInputs:
    """What the result of a run depends on beside its recipe, for its record."""
    return RunInputs(
        checkpoint=job.source.fingerprint,
        calibration=windows.source,
        calibration_sha256=windows.sha256,
        dtype=str(job.dtype).removeprefix("torch."),
        dtype_reason=job.dtype_reason,
        device=job.device.type,
        batch=job.batch,
        bos=windows.bos,
    )


def _images(job: PruningJob) -> Windows:
    """Images from the recipe's folder, or the caller's pixel values."""
    recipe, given = job.recipe, job.options.input_ids
    if given is not None:
        pixels, source = given.detach().to("cpu", torch.float32), "pixel values given by the caller"
    else:
        processor = _image_processor(job)
        paths = draw_images(Path(recipe.calibration), recipe.samples, recipe.seed)
        pixels = read_images(paths, processor)
        source = f"{recipe.calibration}: {len(pixels)} images at random"
    channels = job.skeleton.model.config.num_channels
    if pixels.dim() != 4 or pixels.shape[1] != channels:
        raise ValueError(
            f"the model takes images of {channels} channels, got pixel values "
            f"{tuple(pixels.shape)}; the image processor belongs to another model"
        )
    return Windows(pixels, source, hash_pixels(pixels))


def _image_processor(job: PruningJob) -> Any:
    if job.options.tokenizer is not None:
        return job.options.tokenizer
    if isinstance(job.source, ModuleSource):
        raise ValueError(
            "pruning a loaded image classifier needs its image processor: pass tokenizer=, or "
            "pixel values as calibration="
        )
    return load_image_processor(job.source.checkpoint.folder, job.options.trust_remote_code)


def _tokenizer(job: PruningJob) -> Any:
    """The model's tokenizer; None may do where the source holds token ids.

    That of a loaded model lies where the model was loaded from.
    """
    if job.options.tokenizer is not None or job.recipe.calibration.endswith(".safetensors"):
        return job.options.tokenizer
    if not isinstance(job.source, ModuleSource):
        return load_tokenizer(job.source.checkpoint.folder, job.options.trust_remote_code)
    name = str(getattr(job.source.model, "name_or_path", "") or "")
    try:
        if not name:
            raise ValueError("the model does not say where it was loaded from")
        return load_tokenizer(resolve_folder(name), job.options.trust_remote_code)
    except (ValueError, FileNotFoundError) as fault:
        raise ValueError(
            "pruning a loaded model needs its tokenizer: pass tokenizer=, or token ids as "
            f"calibration= ({fault})"
        ) from fault


def _dense_model(job: PruningJob) -> Any:
    """The whole dense model in memory. It writes the calibration text of source "self"."""
    if isinstance(job.source, ModuleSource):
        return job.source.model
    folder = job.source.checkpoint.folder
    return load_model(folder, job.dtype, job.options.trust_remote_code).to(job.device)
