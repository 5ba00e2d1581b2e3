"""What an image classifier is worth: top-1 accuracy on a folder with a subfolder of images per class.

Legend: N images, K labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from prunus.calibration.images import ImageFolder, list_images, read_images
from prunus.evaluation.model_input import find_folder
from prunus.evaluation.task_scores import paired_difference
from prunus.model.device import choose_device
from prunus.model.dtypes import check_dtype
from prunus.model.image_processor import load_image_processor
from prunus.model.kinds import IMAGES, kind_of
from prunus.model.loading import load_model
from prunus.model.source import load_config

__all__ = ["ImageScore", "image_accuracy"]


@dataclass(frozen=True)
class ImageScore:
    """Top-1 accuracy of one model.

    Attributes:
        model: as it was named.
        images: how many were judged.
        correct: per image whether the label with the largest logit is its class.
        labels: how folders were matched with labels, in words.
        seconds: for reading and judging all images.
    """

    model: str
    images: int
    correct: tuple[bool, ...] = field(repr=False)
    labels: str
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of images that are labelled as their folder says."""
        return sum(self.correct) / self.images

    @property
    def standard_error(self) -> float:
        """Of the accuracy, by the binomial distribution."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.images)

    def minus(self, other: ImageScore) -> tuple[float, float]:
        """The difference to another model's accuracy on the same images, and its standard error, image by image."""
        return paired_difference(other.correct, self.correct)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        figures = {"accuracy": self.accuracy, "standard_error": self.standard_error}
        return {k: v for k, v in asdict(self).items() if k != "correct"} | figures


def image_accuracy(
    models: Sequence[str | Path],
    folder: Path,
    *,
    limit: int | None = None,
    batch: int = 16,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[ImageScore]:
    """Top-1 accuracy of image classifiers on the images of a folder, each as its own image processor prepares them.

    A subfolder is the label of its name, where the model's `label2id` knows all of their names; else, where there are
    as many subfolders as labels, the label of its place in sorted order, as ImageNet's folders are meant.

    Args:
        models: checkpoint folders or hub ids.
        folder: with a subfolder of images per class.
        limit: judge at most so many images, spread evenly over the folder.
        batch: images at once.
        dtype: of the computation: auto (the checkpoint's own), float32, bfloat16 or float16.
        device: auto (CUDA where there is one), cpu, cuda, cuda:i.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: told what is done.

    Raises:
        ValueError: arguments out of range, no class folders, or ones that are not the model's labels; a file that is no
            image; outputs that are not finite.
        NotImplementedError: a model that is no image classifier.
        FileNotFoundError, ModuleNotFoundError: no such folder or model, or Pillow is not installed.
    """
    check_dtype(dtype)
    if batch < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch and limit must be at least 1; got {batch} and {limit}")
    images = list_images(Path(folder))
    if not images.classes:
        raise ValueError(
            f"{folder} has no class folders: accuracy needs a subfolder of images per class"
        )
    place = choose_device(device, None)
    wanted = range(len(images.paths))
    if limit is not None and limit < len(wanted):
        wanted = [step * len(wanted) // limit for step in range(limit)]  # type: ignore[assignment]
    checked = []
    for model in models:
        found = find_folder(model)
        config = load_config(found, trust_remote_code)
        if (kind := kind_of(config)) is not IMAGES:
            raise NotImplementedError(
                f"{model} is a {kind.name}; --images is for image classifiers"
            )
        checked.append((str(model), found, *_labels(images, config)))
    return [
        _score(
            name,
            found,
            labels,
            how,
            images,
            wanted,
            batch,
            dtype,
            place,
            trust_remote_code,
            progress,
        )
        for name, found, labels, how in checked
    ]


def _labels(images: ImageFolder, config: Any) -> tuple[list[int], str]:
    """Per class folder the model's label, and how it was found."""
    by_name = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    if all(name in by_name for name in images.classes):
        return [
            by_name[name] for name in images.classes
        ], "folders by name, through the model's label2id"
    if len(images.classes) == config.num_labels:
        return list(range(config.num_labels)), "folders by sorted order"
    strange = next(name for name in images.classes if name not in by_name)
    raise ValueError(
        f"{images.folder} has {len(images.classes)} class folders, the model {config.num_labels} labels, and {strange!r} "
        f"is none of these ({', '.join(list(by_name)[:3])}, …): name the folders as the labels, or give all of them"
    )


@torch.no_grad()
def _score(
    name: str,
    folder: Path,
    labels: list[int],
    how: str,
    images: ImageFolder,
    wanted: Sequence[int],
    batch: int,
    dtype: str,
    device: torch.device,
    trust_remote_code: bool,
    progress: Callable[[str], None] | None,
) -> ImageScore:
    began = time.perf_counter()
    processor = load_image_processor(folder, trust_remote_code)
    model = load_model(folder, dtype, trust_remote_code, kind=IMAGES).to(device)
    correct: list[bool] = []
    for start in range(0, len(wanted), batch):
        places = wanted[start : start + batch]
        pixels = read_images([images.paths[i] for i in places], processor)
        logits_NK = model(pixel_values=pixels.to(device, model.dtype)).logits.float()
        if not bool(torch.isfinite(logits_NK).all()):
            raise ValueError(
                f"{name}: the model gives logits that are not finite; try --dtype float32"
            )
        expected = [labels[images.labels[i]] for i in places]
        correct += [a == b for a, b in zip(logits_NK.argmax(dim=1).tolist(), expected, strict=True)]
        if progress is not None:
            progress(f"{name}: {len(correct)} of {len(wanted)} images")
    seconds = round(time.perf_counter() - began, 2)
    return ImageScore(name, len(correct), tuple(correct), how, seconds)
