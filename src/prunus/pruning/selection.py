"""Which linears a recipe prunes, and whether its calibration data suit the model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import nn

from prunus.calibration import SOURCES, check_source
from prunus.calibration.bos import refuse_bos
from prunus.calibration.images import check_images
from prunus.methods.patterns import Pattern, check_shape
from prunus.model.kinds import IMAGES, Kind
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.pruning.job import RunOptions
from prunus.pruning.recipe import Recipe

__all__ = ["LinearSelection", "check_inputs", "select_linears", "select_packable"]


class LinearSelection(NamedTuple):
    """The linears of a model, sorted into those that are pruned and the rest.

    Attributes:
        selected: Per block the relative names of the linears to prune.
        left_dense: All other weights with two or more dimensions in the blocks: full name -> shape.
    """

    selected: list[list[str]]
    left_dense: dict[str, tuple[int, ...]]


def select_linears(skeleton: Skeleton, recipe: Recipe, pattern: Pattern) -> LinearSelection:
    """Apply `only` and `ignore` of a recipe to the linears of a model.

    Args:
        skeleton: The model without weights.
        recipe: The name patterns are its `only` and `ignore`.
        pattern: Every selected linear must fit it.

    Raises:
        ValueError: A name pattern matches nothing, or `pattern` does not fit a linear.
        NotImplementedError: The model stores its experts in an unknown form.
    """
    by_block = [skeleton.linears(index) for index in range(len(skeleton))]
    recipe.check_names(
        f"{skeleton.block_name(index)}.{linear.name}"
        for index, linears in enumerate(by_block)
        for linear in linears
    )
    found = LinearSelection([], {})
    for index, linears in enumerate(by_block):
        names = []
        for linear in linears:
            full_name = f"{skeleton.block_name(index)}.{linear.name}"
            if recipe.selects(full_name):
                check_shape(pattern, linear.shape, full_name)
                names.append(linear.name)
            else:
                found.left_dense[f"{full_name}.weight"] = linear.shape
        found.selected.append(names)
        found.left_dense.update(skeleton.left_dense(index))
    return found


def select_packable(
    found: LinearSelection, skeleton: Skeleton, source: CheckpointSource
) -> LinearSelection:
    """The part of a selection that a compressed checkpoint can store as integers.

    The rest stays dense: transposed linears, linears of special classes, and experts that the
    checkpoint stores in one tensor.

    Raises:
        NotImplementedError: Nothing is left.
    """
    stored = source.stored_names()
    kept: list[list[str]] = []
    left_dense = dict(found.left_dense)
    for index, names in enumerate(found.selected):
        kept.append([])
        for linear in skeleton.linears(index):
            if linear.name not in names:
                continue
            full_name = f"{skeleton.block_name(index)}.{linear.name}.weight"
            own = stored.get(full_name, "").endswith(".weight")
            if own and type(linear.module) is nn.Linear:
                kept[-1].append(linear.name)
            else:
                left_dense[full_name] = linear.shape
    if not any(kept):
        raise NotImplementedError(
            "none of the chosen linears can be stored as integers: they are transposed, special, "
            "or experts in one tensor; such a checkpoint cannot be compressed yet"
        )
    return LinearSelection(kept, left_dense)


def check_inputs(kind: Kind, recipe: Recipe, options: RunOptions) -> None:
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
        check_source(recipe.calibration, options.data_dir)
    elif recipe.calibration in SOURCES or not Path(recipe.calibration).is_dir():
        raise ValueError(
            f"an image classifier is calibrated on images, and {recipe.calibration!r} is no "
            "folder: give --calibration DIR, a folder of images or of one subfolder of images per "
            "class"
        )
    else:
        check_images(Path(recipe.calibration), recipe.samples)
