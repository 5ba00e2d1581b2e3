"""The calibration windows of a run: from the source that its recipe names, or given by the caller.

For a language model a window is `seqlen` token ids. For an image classifier it is one image.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from prunus.calibration import SOURCES, Windows, check_source, hash_ids, load_windows
from prunus.calibration.bos import refuse_bos
from prunus.calibration.images import check_images, draw_images, hash_pixels, read_images
from prunus.calibration.texts import are_texts, windows_from_texts
from prunus.model.chat_template import apply_chat_template
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.image_processor import load_image_processor
from prunus.model.kinds import IMAGES, Kind
from prunus.model.loading import load_model
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.model.tokenizer import load_tokenizer
from prunus.runs.job import RunJob
from prunus.runs.options import RunOptions, WindowOptions
from prunus.runs.record import WindowInputs

__all__ = ["calibration_windows", "check_inputs", "describe_given", "given_windows", "run_inputs"]


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


def given_windows(calibration: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The caller's calibration as options of a run, and as the options of a recipe that say so.

    Args:
        calibration: As for `describe_given`.

    >>> given_windows(["one text", "another"])
    ({'texts': ['one text', 'another']}, {'calibration': 'texts'})
    """
    described = describe_given(calibration)
    if isinstance(calibration, torch.Tensor):
        return {"input_ids": calibration}, described
    return ({"texts": calibration} if are_texts(calibration) else {}), described


def calibration_windows(job: RunJob) -> Windows:
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
            data_dir=job.options.data,
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


def run_inputs(job: RunJob, windows: Windows) -> WindowInputs:
    """What the result of a run depends on besides its recipe, for its record.

    Raises:
        ValueError: A tensor outside the blocks is not finite; names it.
    """
    source = job.source
    outside: dict[str, str] = {}
    if isinstance(source, CheckpointSource):
        outside = job.ranks.on_rank_0(source.outside_digests)
    return WindowInputs(
        checkpoint=source.fingerprint,
        outside=outside,
        calibration=windows.source,
        calibration_sha256=windows.sha256,
        dtype=str(job.dtype).removeprefix("torch."),
        dtype_reason=job.dtype_reason,
        device=job.device.type,
        batch=job.batch,
        bos=windows.bos,
    )


def _images(job: RunJob) -> Windows:
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


def _image_processor(job: RunJob) -> Any:
    if job.options.tokenizer is not None:
        return job.options.tokenizer
    if isinstance(job.source, ModuleSource):
        raise ValueError(
            "pruning a loaded image classifier needs its image processor: pass tokenizer=, or "
            "pixel values as calibration="
        )
    return load_image_processor(job.source.checkpoint.folder, job.options.trust_remote_code)


def _tokenizer(job: RunJob) -> Any:
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


def _dense_model(job: RunJob) -> Any:
    """The whole dense model in memory. It writes the calibration text of source "self"."""
    if isinstance(job.source, ModuleSource):
        return job.source.model
    folder = job.source.checkpoint.folder
    return load_model(folder, job.dtype, job.options.trust_remote_code).to(job.device)


def check_inputs(kind: Kind, recipe: WindowOptions, options: RunOptions) -> None:
    """Check that the calibration data are of the kind that the model takes, before any are read.

    Args:
        kind: Of the model: text or images.
        recipe: It names the calibration source.
        options: Token ids, pixel values or texts that the caller gives instead of a source, and
            the folder with local copies of the corpora.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: The data are of another kind, missing,
            or need a library that is not installed.
    """
    # A sweep draws the windows of a text itself and gives them with the text's name.
    if kind is IMAGES:
        refuse_bos("image pixels", recipe.bos)
    elif recipe.calibration == "token ids" or recipe.calibration.endswith(".safetensors"):
        refuse_bos(recipe.calibration, recipe.bos)
    inputs = options.input_ids
    if inputs is not None:
        if inputs.is_floating_point() != (kind is IMAGES):
            wanted = (
                "pixel values (samples, channels, height, width)" if kind is IMAGES else "token ids"
            )
            raise ValueError(
                f"an {kind.name} is calibrated on {wanted}; got {inputs.dtype} "
                f"{tuple(inputs.shape)}"
            )
    elif options.texts is not None:
        if kind is IMAGES:
            raise ValueError("an image classifier is calibrated on images, and texts were given")
    elif kind is not IMAGES:
        check_source(recipe.calibration, options.data)
    elif recipe.calibration in SOURCES or not Path(recipe.calibration).is_dir():
        raise ValueError(
            f"an image classifier is calibrated on images, and {recipe.calibration!r} is not a "
            "folder: give `calibration` a folder of images or of one subfolder of images per "
            "class"
        )
    else:
        check_images(Path(recipe.calibration), recipe.samples)
