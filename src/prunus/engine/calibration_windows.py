"""The calibration windows of a run: from the source that its recipe names, or given by the caller.

For a language model a window is `seqlen` token ids. For an image classifier it is one image.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from prunus.calibration.sources import TextSource, WindowSource, are_texts, find_source
from prunus.calibration.windows import WindowRequest, Windows, check_ids, hash_ids
from prunus.distributed import on_rank_0
from prunus.engine.run_options import GIVEN, RunOptions, WindowOptions
from prunus.engine.run_plan import RunPlan
from prunus.engine.run_record import WindowInputs
from prunus.model.kinds import IMAGES, kind_of
from prunus.model.source import CheckpointSource, ModuleSource
from prunus.model.tokenizer import (
    check_tokenizer,
    load_image_processor,
    load_tokenizer,
    tokenizer_of_loaded,
)


def given_windows(calibration: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split `calibration` into run options (the data) and recipe options (their description).

    Args:
        calibration: Token ids (samples, seqlen), pixel values (samples, channels, height, width),
            texts, rows of a data set or chats; or the name or path of a source; None for the
            recipe's.

    Returns:
        The options of `RunOptions` that hold the data, and the options of a recipe that describe
        them.

    Raises:
        ValueError: A tensor is neither token ids nor pixel values.

    >>> given_windows(torch.zeros(8, 512, dtype=torch.int64))[1]
    {'calibration': 'token ids', 'samples': 8, 'seqlen': 512}
    >>> given_windows(["one text", "another"])
    ({'calibration_data': ['one text', 'another']}, {'calibration': 'texts'})
    >>> given_windows("c4")
    ({}, {'calibration': 'c4'})
    """
    texts, images, ids = GIVEN
    data = {"calibration_data": calibration}
    if are_texts(calibration):
        return data, {"calibration": texts}
    if not isinstance(calibration, torch.Tensor):
        return {}, {"calibration": None if calibration is None else str(calibration)}
    shape = tuple(calibration.shape)
    is_float = calibration.dtype.is_floating_point
    if calibration.numel() and len(shape) == 4 and is_float:
        return data, {"calibration": images, "samples": shape[0]}
    if calibration.numel() and len(shape) == 2 and not is_float:
        return data, {"calibration": ids, "samples": shape[0], "seqlen": shape[1]}
    raise ValueError(
        f"token ids must be integers (windows, tokens), got {calibration.dtype} {shape}; "
        "pixel values of images are floats (samples, channels, height, width)"
    )


def check_inputs(
    source: CheckpointSource | ModuleSource, recipe: WindowOptions, options: RunOptions
) -> None:
    """Check that the calibration data suit the model and the recipe, before any are read.

    Raises:
        ValueError, FileNotFoundError: They do not suit, or the checkpoint has no tokenizer and the
            caller gives none.
    """
    source_of_windows = windows_source(recipe, options)
    source_of_windows.check(_wanted(recipe, options), images=kind_of(source.config) is IMAGES)
    needs_tokenizer = isinstance(source_of_windows, TextSource) and options.tokenizer is None
    if isinstance(source, CheckpointSource) and needs_tokenizer:
        check_tokenizer(source.folder)


def calibration_windows(plan: RunPlan) -> Windows:
    """The calibration windows of a run; none if nothing in the run looks at inputs.

    Raises:
        ValueError: There are too few windows, or the model does not know some token ids, or takes
            images of other channels.
    """
    recipe = plan.recipe
    if not plan.needs_inputs:
        nothing = torch.zeros((0, recipe.seqlen), dtype=torch.int64)
        return Windows(nothing, "none: the method looks at weights only", hash_ids(nothing))
    windows = windows_source(recipe, plan.options).draw(window_request(plan))
    if plan.skeleton.kind is IMAGES:
        channels = plan.skeleton.model.config.num_channels
        if windows.ids.dim() != 4 or windows.ids.shape[1] != channels:
            raise ValueError(
                f"the model takes images of {channels} channels, got pixel values "
                f"{tuple(windows.ids.shape)}; the image processor belongs to another model"
            )
        return windows
    rows = plan.skeleton.model.get_input_embeddings().weight.shape[0]
    check_ids(windows.ids, rows, "the calibration token ids")
    return windows


def window_request(plan: RunPlan) -> WindowRequest:
    """What the windows of a run must be, with the tokenizer of its model."""
    wanted = _wanted(plan.recipe, plan.options)
    return dataclasses.replace(wanted, tokenizer=lambda: run_tokenizer(plan))


def windows_source(recipe: WindowOptions, options: RunOptions) -> WindowSource:
    """Where the windows come from: what the caller gives, or what the recipe names."""
    data = options.calibration_data
    return find_source(recipe.calibration if data is None else data)


def _wanted(recipe: WindowOptions, options: RunOptions) -> WindowRequest:
    return WindowRequest(
        samples=recipe.samples,
        seqlen=recipe.seqlen,
        seed=recipe.seed,
        bos=recipe.bos,
        data=options.data,
    )


def run_inputs(
    plan: RunPlan, windows: Windows, outside: dict[str, str] | None = None
) -> WindowInputs:
    """What the result of a run depends on besides its recipe, for its record.

    All processes must call it.

    Args:
        plan: The run.
        windows: Its calibration windows.
        outside: The hashes of the tensors outside the blocks, if they are known. For None rank 0
            reads every byte of these tensors to hash it.
    """
    source = plan.source
    if outside is None:
        outside = on_rank_0(source.outside_digests) if isinstance(source, CheckpointSource) else {}
    return WindowInputs(
        checkpoint=source.fingerprint,
        outside=outside,
        calibration=windows.source,
        calibration_sha256=windows.sha256,
        dtype=str(plan.dtype).removeprefix("torch."),
        dtype_reason=plan.dtype_reason,
        device=plan.device.type,
        batch=plan.batch,
        bos=windows.bos,
        measure_error=plan.options.measure_error,
        **plan.given_sha256,
    )


def run_tokenizer(plan: RunPlan) -> Any:
    """The model's tokenizer or image processor; a loaded model has it where it was loaded from."""
    options = plan.options
    if options.tokenizer is not None:
        return options.tokenizer
    read = load_image_processor if plan.skeleton.kind is IMAGES else load_tokenizer
    if not isinstance(plan.source, ModuleSource):
        return read(plan.source.folder)
    if plan.skeleton.kind is IMAGES:
        raise ValueError(
            "pruning a loaded image classifier needs its image processor: pass tokenizer=, or "
            "pixel values as calibration="
        )
    try:
        return tokenizer_of_loaded(plan.source.model, options.trust_remote_code)
    except (ValueError, FileNotFoundError) as fault:
        raise ValueError(
            "pruning a loaded model needs its tokenizer: pass tokenizer=, or token ids as "
            f"calibration= ({fault})"
        ) from fault
