"""Images from a folder, as an image classifier takes them.

The folder holds images, or one subfolder of images per class. The order is that of the names, so
that the same folder gives the same images on every host.

Shape suffixes: N images.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunus.words import require_library

#: How the names of images may end.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def list_images(folder: Path) -> list[Path]:
    """The images of a folder, by class and name. Opens none.

    Raises:
        FileNotFoundError: There is no such folder.
        ModuleNotFoundError: Pillow is not installed.
        ValueError: The folder holds no images, or images next to folders of images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder of images: give one with images in it, or with a subfolder "
            "of images per class"
        )
    require_library("PIL", "reading images", "vision")
    flat = _images_in(folder)
    classes = sorted(
        (path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.name
    )
    by_class = [image for subfolder in classes for image in _images_in(subfolder)]
    if flat and by_class:
        raise ValueError(
            f"{folder} holds images ({flat[0].name}) next to folders of images "
            f"({by_class[0].parent.name}): keep either"
        )
    if not flat and not by_class:
        raise ValueError(f"{folder} holds no images: names must end in {', '.join(SUFFIXES)}")
    return flat or by_class


def _images_in(folder: Path) -> list[Path]:
    """The images directly in a folder, by name."""
    files = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return sorted(filter(Path.is_file, files), key=lambda path: path.name)


def draw_images(folder: Path, samples: int, seed: int) -> list[Path]:
    """`samples` different images of a folder, at random; the same seed draws the same.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: As `list_images`. ValueError also where
            the folder holds fewer images.
    """
    paths = list_images(folder)
    if len(paths) < samples:
        raise ValueError(
            f"{folder} holds {len(paths)} images, fewer than `samples` {samples}; use fewer"
        )
    return [paths[index] for index in random.Random(seed).sample(range(len(paths)), samples)]


def read_images(paths: Sequence[Path], processor: Any) -> torch.Tensor:
    """Pixel values (N, channels, height, width), float32, by the model's image processor.

    Args:
        paths: The files of the images.
        processor: An image processor of transformers.

    Raises:
        ValueError: A file is not an image, or the processor leaves images in several sizes.
    """
    from PIL import Image

    images: list[torch.Tensor] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                colours = image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as fault:  # Pillow's decoders raise all of these
            raise ValueError(f"{path} cannot be read as an image: {fault}") from fault
        pixels = processor(colours, return_tensors="pt")["pixel_values"][0].float()
        if images and pixels.shape != images[0].shape:
            raise ValueError(
                f"{path} becomes {tuple(pixels.shape)} pixel values, the images before it "
                f"{tuple(images[0].shape)}: the image processor must resize or crop all images to "
                "one size"
            )
        images.append(pixels)
    return torch.stack(images)
