"""Image classifiers, trained from scratch and pruned: top-1 accuracy by method, group and sparsity.

    python benchmarks/vision.py WORK [--json FILE]

It needs the extra vision, and scikit-learn.

scikit-learn ships 1797 handwritten digits of 8 × 8 pixels. 1297 of them, randomly shifted, train a
small ViT and a small ConvNeXt. The other 500 are the test set. Calibration uses 128 of the training
images. All files are written to WORK; classifiers that are there already are not trained again. The
benchmark takes about three minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import save
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

torch.set_num_threads(1)

import prunus  # noqa: E402
from prunus.calibration.images import list_images, read_images  # noqa: E402

SIDE, TRAINED, BATCH = 8, 1297, 64
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
WAYS = (
    ("magnitude", "layer"),
    ("magnitude", "row"),
    ("wanda", "layer"),
    ("wanda", "row"),
    ("alps", "row"),
)
EPOCHS = {"vit": 60, "convnext": 40}
CALIBRATION: dict[str, Any] = {"samples": 128, "dtype": "float32", "overwrite": True}


def pictures(work: Path) -> tuple[Path, Path]:
    """Write the folders of training and test images, with a subfolder per digit."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    folders = work / "train", work / "test"
    for place, number in enumerate(order):
        folder = folders[place >= TRAINED] / str(digits.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        grey = (digits.images[number] * (255 / 16)).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{number:04}.png")
    return folders


def classifier(kind: str) -> Any:
    options: dict[str, Any] = {"image_size": SIDE, "id2label": {i: str(i) for i in range(10)}}
    options["label2id"] = {str(i): i for i in range(10)}
    if kind == "vit":
        options |= {"hidden_size": 96, "intermediate_size": 384}
        options |= {"num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 2}
        return ViTForImageClassification(ViTConfig(**options))
    options |= {"num_stages": 2, "hidden_sizes": [48, 96], "depths": [2, 3]}
    options |= {"layer_scale_init_value": 0.1, "patch_size": 1}
    return ConvNextForImageClassification(ConvNextConfig(**options))


def train(kind: str, folder: Path, target: Path) -> None:
    """Train with AdamW and a one-cycle schedule. Each batch is shifted by up to one pixel."""
    torch.manual_seed(0)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    images = list_images(folder)
    pixels = read_images(images, processor)
    labels = torch.tensor([int(path.parent.name) for path in images])
    model = classifier(kind)
    steps = EPOCHS[kind] * (len(pixels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        if step % (len(pixels) // BATCH) == 0:
            order = torch.randperm(len(pixels))
        rows = order[(start := step % (len(pixels) // BATCH) * BATCH) : start + BATCH]
        shift = torch.randint(-1, 2, (2,)).tolist()
        loss = model(pixel_values=pixels[rows].roll(shift, dims=(2, 3)), labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(target)
    processor.save_pretrained(target)


@torch.no_grad()
def accuracy(model: Path, folder: Path) -> float:
    """Share of the images of a folder that a classifier recognises."""
    loaded, processor = prunus.load(model, dtype="float32")
    images = list_images(folder)
    logits = loaded(pixel_values=read_images(images, processor)).logits
    labels = torch.tensor([int(path.parent.name) for path in images])
    return float((logits.argmax(dim=1) == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    training, testing = pictures(options.work)
    found: dict[str, Any] = {}
    for kind in EPOCHS:
        dense = options.work / kind
        if not (dense / "model.safetensors").exists():
            train(kind, training, dense)
        share, images = accuracy(dense, testing), len(list_images(testing))
        error = (share * (1 - share) / images) ** 0.5
        print(f"{kind}: {share:.1%} ± {error:.1%} dense, {images} images")
        found[kind] = {"dense": share}
        print("sparsity".ljust(18), *(f"{sparsity:>7.0%}" for sparsity in SPARSITIES))
        for method, group in WAYS:
            row = []
            for sparsity in SPARSITIES:
                out = options.work / f"{kind} {method} {group} {sparsity}"
                how = {"method": method, "sparsity": sparsity, "group": group}
                prunus.prune(dense, out, **how, **CALIBRATION, calibration=str(training))
                row.append(accuracy(out, testing))
            ways = {f"{each:.0%}": right for each, right in zip(SPARSITIES, row, strict=True)}
            found[kind][f"{method}, per {group}"] = ways
            shown = (f"{share:7.1%}" for share in row)
            print(f"{method}, per {group}".ljust(18), *shown, flush=True)
    if options.json is not None:
        sparsities = [f"{sparsity:.0%}" for sparsity in SPARSITIES]
        figures = {"accuracy": found, "sparsities": sparsities}
        save(options.json, figures, "make results RESULTS=vision")


if __name__ == "__main__":
    main()
