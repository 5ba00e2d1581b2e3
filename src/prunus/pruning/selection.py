"""Which linears of a model a recipe prunes, what stays dense, and whether there is something to calibrate it on."""

from __future__ import annotations

from pathlib import Path

import torch

from prunus.calibration import SOURCES, check_source
from prunus.calibration.images import check_images
from prunus.methods.patterns import Pattern, check_shape
from prunus.model.kinds import IMAGES, Kind
from prunus.model.skeleton import Skeleton
from prunus.pruning.recipe import Recipe

__all__ = ["check_inputs", "select_linears"]


def select_linears(
    skeleton: Skeleton, recipe: Recipe, pattern: Pattern
) -> tuple[list[list[str]], dict[str, tuple[int, ...]]]:
    """Per block the linears to prune, and everything in the blocks that stays dense, by full name with its shape.

    Raises:
        ValueError: name patterns that match nothing, or a linear that the pattern does not fit.
        NotImplementedError: experts in a form that is not known.
    """
    linears = [
        [
            (f"{skeleton.block_name(index)}.{linear.name}", linear)
            for linear in skeleton.linears(index)
        ]
        for index in range(len(skeleton))
    ]
    recipe.check_names(name for block in linears for name, _ in block)
    dense: dict[str, tuple[int, ...]] = {}
    selected: list[list[str]] = []
    for index, block in enumerate(linears):
        chosen = []
        for name, linear in block:
            if recipe.selects(name):
                check_shape(pattern, linear.shape, name)
                chosen.append(linear.name)
            else:
                dense[f"{name}.weight"] = linear.shape
        selected.append(chosen)
        dense |= skeleton.left_dense(index)
    return selected, dense


def check_inputs(
    kind: Kind, recipe: Recipe, inputs: torch.Tensor | None, data_dir: Path | None
) -> None:
    """See that the calibration is of what the model takes, as far as can be told without reading it.

    Args:
        kind: of the model.
        recipe: names the source.
        inputs: token ids or pixel values given instead of one.
        data_dir: local mirror of the corpora.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: it is not, or not there; says what would be.
    """
    if inputs is not None:
        if inputs.is_floating_point() != (kind is IMAGES):
            wanted = (
                "pixel values (samples, channels, height, width)" if kind is IMAGES else "token ids"
            )
            raise ValueError(
                f"an {kind.name} is calibrated on {wanted}; got {inputs.dtype} {tuple(inputs.shape)}"
            )
    elif kind is not IMAGES:
        check_source(recipe.calibration, data_dir)
    elif recipe.calibration in SOURCES or not Path(recipe.calibration).is_dir():
        raise ValueError(
            f"an image classifier is calibrated on images, and {recipe.calibration!r} is no folder: give --calibration "
            "DIR, a folder of images or of one subfolder of images per class"
        )
    else:
        check_images(Path(recipe.calibration), recipe.samples)
