"""Top-1 accuracy of image classifiers, on a folder with a subfolder of images per class.

Legend: N images, K labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from prunus.calibration.images import ImageFolder, list_images, read_images
from prunus.evaluation.model_input import find_folder
from prunus.evaluation.options import ImageOptions
from prunus.evaluation.records import EvaluationRecord
from prunus.evaluation.streamed_model import ComputeOptions
from prunus.evaluation.task_scores import paired_difference
from prunus.evaluation.watched import WatchedCheckpoint, unchanged
from prunus.model.config import load_config
from prunus.model.device import choose_device
from prunus.model.kinds import IMAGES, kind_of
from prunus.model.tokenizer import load_image_processor

#: Images per forward pass where `batch` is auto.
_AT_ONCE = 16


@dataclass(frozen=True)
class ImageScore(EvaluationRecord):
    """Top-1 accuracy of one model.

    >>> dense = ImageScore("dense", 4, (True, True, True, False), "by name", 1.0)
    >>> pruned = ImageScore("pruned", 4, (True, False, True, False), "by name", 1.0)
    >>> dense.accuracy, pruned.minus(dense)
    (0.75, (-0.25, 0.25))

    Attributes:
        model: name of the model.
        images: number of images.
        correct: for every image, whether the label with the largest logit is its class.
        labels: how folders were matched with labels, in words.
        seconds: time of reading and classifying all images.
    """

    model: str
    images: int
    correct: Annotated[tuple[bool, ...], Field(exclude=True, repr=False)]
    labels: str
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of correct images, 0 to 1."""
        return sum(self.correct) / self.images

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy p on n images, √(p (1 − p) / n): it is binomial."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.images)

    def minus(self, other: ImageScore) -> tuple[float, float]:
        """The difference to another model's accuracy on the same images, and its paired error."""
        return paired_difference(other.correct, self.correct)

    def as_dict(self) -> dict[str, Any]:
        """The score as plain values for JSON, without the outcomes of single images."""
        shares = {"accuracy": self.accuracy, "standard_error": self.standard_error}
        return super().as_dict() | shares


def image_accuracy(
    models: Sequence[str | Path],
    folder: Path,
    *,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> list[ImageScore]:
    """Top-1 accuracy of image classifiers. Each model's own image processor prepares the images.

    The name of a subfolder is its label, if the model's `label2id` has the names of all subfolders.
    Otherwise there must be as many subfolders as labels, and the position in sorted order is the
    label, as for ImageNet's folders.

    Args:
        folder: a folder with a subfolder of images per class.
        **options: see `ImageOptions`.

    Raises:
        ValueError: an argument is out of range, there are no class folders, they do not match the
            model's labels, a file is not an image, or outputs are not finite.
        NotImplementedError: a model is not an image classifier.
        FileNotFoundError, ModuleNotFoundError: no such folder or model, or Pillow is not installed.
    """
    given = ImageOptions.read(None, options)
    compute = ComputeOptions(
        given.dtype, choose_device(given.device), trust_remote_code=given.trust_remote_code
    )
    images = list_images(Path(folder))
    if not images.classes:
        raise ValueError(
            f"{folder} has no class folders: accuracy needs a subfolder of images per class"
        )
    count = len(images.paths)
    chosen: Sequence[int] = range(count)
    if given.limit is not None and given.limit < count:
        # Images are sorted by class. The first ones would all be of the same class.
        chosen = [step * count // given.limit for step in range(given.limit)]
    batches = [
        chosen[start : start + size]
        for size in [_AT_ONCE if given.batch == "auto" else given.batch]
        for start in range(0, len(chosen), size)
    ]
    # All models are checked before the first is loaded.
    checked = []
    for model in models:
        found = find_folder(model)
        config = load_config(found, given.trust_remote_code)
        if (kind := kind_of(config)) is not IMAGES:
            raise NotImplementedError(f"{model} is a {kind.name}; images are for image classifiers")
        checked.append((str(model), found, *_labels(images, config)))
    scores = []
    for name, found, labels, how in checked:
        started, correct = time.perf_counter(), []
        with unchanged([WatchedCheckpoint(found)]):
            for right in _classify(name, found, images, batches, labels, compute):
                correct += right
                if progress is not None:
                    progress(f"{name}: {len(correct)} of {len(chosen)} images")
        seconds = round(time.perf_counter() - started, 2)
        scores.append(ImageScore(name, len(correct), tuple(correct), how, seconds))
    return scores


def _labels(images: ImageFolder, config: Any) -> tuple[list[int], str]:
    """The model's label of every class folder, and how it was found."""
    by_name = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    if all(name in by_name for name in images.classes):
        return [
            by_name[name] for name in images.classes
        ], "folders by name, through the model's label2id"
    if len(images.classes) == config.num_labels:
        return list(range(config.num_labels)), "folders by sorted order"
    unknown = next(name for name in images.classes if name not in by_name)
    raise ValueError(
        f"{images.folder} has {len(images.classes)} class folders, the model {config.num_labels} "
        f"labels, and {unknown!r} is none of these ({', '.join(list(by_name)[:3])}, …): name the "
        "folders as the labels, or give all of them"
    )


@torch.no_grad()
def _classify(
    name: str,
    folder: Path,
    images: ImageFolder,
    batches: Sequence[Sequence[int]],
    labels: list[int],
    compute: ComputeOptions,
) -> Iterator[list[bool]]:
    """Whether the images of each batch are classified right. `labels` has that of every class."""
    processor = load_image_processor(folder, compute.trust_remote_code)
    model = compute.load(folder)
    for places in batches:
        pixels = read_images([images.paths[i] for i in places], processor)
        logits_NK = model(pixel_values=pixels.to(compute.device, model.dtype)).logits.float()
        if not bool(torch.isfinite(logits_NK).all()):
            raise ValueError(
                f"{name}: the model gives logits that are not finite; try `dtype` float32"
            )
        expected = [labels[images.labels[i]] for i in places]
        yield [a == b for a, b in zip(logits_NK.argmax(dim=1).tolist(), expected, strict=True)]
