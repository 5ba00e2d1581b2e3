"""Tiny random image classifiers, and folders of small pictures to calibrate and score them on."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification

from tiny import SIZES

CLASSES = ("cat", "dog", "eel")
_TRANSFORMER: dict[str, Any] = SIZES | {"patch_size": 4}
_STAGES: dict[str, Any] = {
    "hidden_sizes": [8, 16],
    "depths": [1, 2],
    "num_stages": 2,
    "patch_size": 2,
}

CLASSIFIERS: dict[str, dict[str, Any]] = {
    "vit": _TRANSFORMER,
    "deit": _TRANSFORMER,
    "beit": _TRANSFORMER,
    "dinov2": _TRANSFORMER,
    "convnext": _STAGES,
    "convnextv2": _STAGES,
}


def tiny_classifier(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random classifier of three animals in pictures of 16 × 16 pixels."""
    labels = {
        "id2label": dict(enumerate(reversed(CLASSES))),
        "label2id": {n: 2 - i for i, n in enumerate(CLASSES)},
    }
    config = AutoConfig.for_model(family, image_size=16, **CLASSIFIERS[family], **labels)
    if family == "deit":
        config.architectures = ["DeiTForImageClassification"]
    torch.manual_seed(3)
    model = AutoModelForImageClassification.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_classifier(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """Save a `tiny_classifier` with its image processor; returns the folder."""
    from transformers import ViTImageProcessorPil

    tiny_classifier(family, dtype).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def pictures(folder: Path, per_class: int = 4, classes: tuple[str, ...] = CLASSES) -> Path:
    """Make pictures of noise, of different sizes and modes, in a subfolder per class.

    Without classes they lie in `folder` itself.
    """
    from PIL import Image

    noise = torch.Generator().manual_seed(5)
    for name in classes or ("",):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            size = (20 + number, 17, 3)
            values = torch.randint(0, 256, size, generator=noise, dtype=torch.uint8).numpy()
            image = Image.fromarray(values)
            (image.convert("L") if number == 0 else image).save(folder / name / f"{number}.png")
    return folder
