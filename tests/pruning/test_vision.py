"""Image classifiers: the same run on pixel values, calibration from folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("PIL")

from transformers import AutoModelForImageClassification, ViTImageProcessorPil

import prunus
from command_line import call
from pictures import CLASSES, CLASSIFIERS, pictures, save_classifier, tiny_classifier
from prunus.calibration.images import draw_images, list_images, read_images
from prunus.engine.block_memory import Memory
from prunus.model.skeleton import Skeleton
from reference import assert_three_ways_agree, prune_as_called, prune_rows
from refusals import assert_refused
from stopping import assert_resumes, stop_after
from tiny import shards


def loaded(folder: Path) -> Any:
    return AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()


def naive(model: Any, pixels: torch.Tensor, sparsity: float, group: str, wanda: bool) -> None:
    """Prune in place, linear by linear in the order in which the whole model calls them."""
    todo = [
        m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and "classifier" not in n and "pooler" not in n
    ]

    def prune(weight_OI: torch.Tensor, X_TI: torch.Tensor) -> None:
        if group == "row":
            return prune_rows(weight_OI, X_TI, sparsity)
        score_OI = weight_OI.abs()
        if wanda:
            score_OI = score_OI * X_TI.double().square().sum(0).sqrt().float()
        # As in the original code, magnitude also removes the weight at the threshold.
        count = int(score_OI.numel() * sparsity) + (0 if wanda else 1)
        weight_OI.view(-1)[score_OI.flatten().sort(stable=True).indices[:count]] = 0
        return None

    prune_as_called(todo, pixels.split(2), lambda part: model(pixel_values=part), prune)


@pytest.mark.parametrize(
    ("family", "method", "group"),
    [(family, "wanda", "row") for family in sorted(CLASSIFIERS)]
    + [
        (family, *way)
        for family in ("vit", "convnext")
        for way in (("wanda", "layer"), ("magnitude", "layer"))
    ],
)
def test_streaming_equals_in_memory_equals_naive(family, method, group, tmp_path):
    dense = save_classifier(tmp_path / "dense", family)
    folder = pictures(tmp_path / "pictures")
    options: dict[str, Any] = {"method": method, "group": group, "sparsity": 0.5, "batch": 2}
    report = prunus.prune(dense, tmp_path / "pruned", calibration=str(folder), samples=6, **options)
    processor = ViTImageProcessorPil.from_pretrained(dense)
    pixels = read_images(draw_images(folder, 6, 0), processor)
    expected = loaded(dense)
    naive(expected, pixels, 0.5, group, method == "wanda")
    in_place = tiny_classifier(family)
    prunus.prune(in_place, calibration=pixels, **options)
    result = loaded(tmp_path / "pruned")
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert_three_ways_agree(result, in_place, expected, differ=2e-3)
    assert (tmp_path / "pruned" / "preprocessor_config.json").exists()
    assert "AutoModelForImageClassification" in (tmp_path / "pruned" / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("vit", {"method": "sparsegpt"}),
        ("convnext", {"method": "alps", "pattern": "2:4"}),
        ("vit", {"propagate": "block"}),
        ("vit", {"allocation": "fisher"}),
        ("convnext", {"allocation": "fisher"}),
        ("vit", {"method": "alps", "dense_weight": 0.25}),
        ("convnext", {"reconstruct": "all", "reconstruct_epochs": 1, "samples": 4, "batch": 1}),
    ],
)
def test_other_kinds_of_runs(family, options, tmp_path):
    dense = save_classifier(tmp_path / "dense", family)
    arguments = {"calibration": str(pictures(tmp_path / "pictures")), "samples": 6, **options}
    report = prunus.prune(dense, tmp_path / "pruned", **arguments)
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=0.02)
    if options.get("dense_weight"):
        notes = [record.notes for block in report.blocks for record in block.linears.values()]
        assert not any("dense_targets" in each for each in notes), "positions stay the same"
    with torch.no_grad():
        assert bool(loaded(tmp_path / "pruned")(torch.randn(2, 3, 16, 16)).logits.isfinite().all())


def test_resumed_spilled_and_replayed_runs_give_the_same_bytes(tmp_path, monkeypatch):
    dense = save_classifier(tmp_path / "dense", "convnext")
    options: dict[str, Any] = {
        "calibration": str(pictures(tmp_path / "pictures")),
        "samples": 6,
        "batch": 2,
    }

    def run(out: Path, **more: Any) -> None:
        prunus.prune(dense, out, **options, **more)

    assert_resumes(run, tmp_path, stop_after(2))
    monkeypatch.setattr(Memory, "spills", True)
    monkeypatch.setattr(Memory, "fits_lockstep", lambda self, index: False)
    run(tmp_path / "replayed")
    assert shards(tmp_path / "replayed") == shards(tmp_path / "whole")


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_what_a_plan_says_of_an_image_is_what_the_model_makes_of_it(family):
    model = tiny_classifier(family)
    skeleton = Skeleton(model.config, torch.float32)
    with torch.no_grad():
        hidden = model(torch.randn(1, 3, 16, 16), output_hidden_states=True).hidden_states
    for index in range(len(skeleton)):
        after = hidden[index + 1]
        positions = after[0, 0].numel() if after.dim() == 4 else after.shape[1]
        width = after.shape[1] if after.dim() == 4 else after.shape[2]
        planned_allocation = skeleton.window_shape(index, 2048)
        assert planned_allocation[1] == width
        assert positions <= planned_allocation[0] <= positions + 1


def test_a_run_from_the_command_line(tmp_path):
    dense = save_classifier(tmp_path / "dense", "vit")
    folder = pictures(tmp_path / "pictures")
    call("prune", dense, tmp_path / "pruned", "--calibration", folder, "--samples", 6)
    assert "patch_embed" not in call("plan", dense, "--calibration", folder, "--samples", 6).stdout
    assert prunus.inspect(tmp_path / "pruned").sparsity == pytest.approx(0.5)


def test_images_are_drawn_by_seed_whatever_the_order_of_the_file_system(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "pictures", per_class=5)
    drawn = draw_images(folder, 7, 1)
    assert len(set(drawn)) == 7
    assert drawn != draw_images(folder, 7, 2)
    plain = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(plain(self), reverse=True)))
    assert draw_images(folder, 7, 1) == drawn
    assert [path.parent.name for path in list_images(folder)] == sorted(CLASSES * 5)
    assert list_images(pictures(tmp_path / "flat", classes=()))


def test_unusable_calibration_images_are_refused(tmp_path):
    dense = save_classifier(tmp_path / "dense", "vit")
    folder = pictures(tmp_path / "pictures")

    def refused(error: type[Exception], message: str, **options: Any) -> None:
        assert_refused(error, message, prunus.prune, dense, tmp_path / "out", **options)

    refused(ValueError, "calibrated on images, not on mix: give a folder of images", samples=4)
    refused(
        ValueError, "holds 12 images, fewer than `samples` 13", calibration=str(folder), samples=13
    )
    refused(
        ValueError,
        "calibrated on images, not on token ids",
        calibration=torch.ones(2, 4, dtype=torch.int64),
    )
    refused(
        NotImplementedError,
        "no linear as its output head",
        calibration=str(folder),
        samples=4,
        head=True,
    )
    (folder / "stray.png").write_bytes(b"nothing")
    refused(ValueError, "next to folders of images", calibration=str(folder), samples=4)
    (tmp_path / "empty").mkdir()
    refused(ValueError, "holds no images", calibration=str(tmp_path / "empty"), samples=4)
    (folder / "stray.png").rename(folder / "cat" / "9.png")
    refused(ValueError, r"9\.png cannot be read as an image", calibration=str(folder), samples=13)
    (dense / "preprocessor_config.json").unlink()
    (folder / "cat" / "9.png").unlink()
    refused(ValueError, "has no image processor", calibration=str(folder), samples=4)


def test_verbs_of_language_models_refuse_a_classifier(tmp_path):
    dense = save_classifier(tmp_path / "dense", "vit", torch.bfloat16)
    for arguments in (
        ("eval", dense),
        ("recover", dense, tmp_path / "o", "--mode", "masked"),
    ):
        assert "image classifier" in call(*arguments, status=2).output.replace("\n", " ")
    sweep = f'title = "x"\nmodels = ["{dense}"]\n[[grid]]\nmethod = "magnitude"\nsparsity = 0.5\n'
    (tmp_path / "sweep.toml").write_text(sweep)
    text = call("sweep", tmp_path / "sweep.toml", tmp_path / "o", status=2).output
    assert "is for causal language models; this is an image" in " ".join(text.split()), text
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("size", [0, -4, "large", [16], [16, 0], None])
def test_a_damaged_image_size_is_refused(size, tmp_path):
    dense = save_classifier(tmp_path / "dense", "convnext")
    content = json.loads((dense / "config.json").read_text()) | {"image_size": size}
    (dense / "config.json").write_text(json.dumps(content))
    given, words = {"calibration": torch.randn(4, 3, 16, 16)}, "image_size|describes no model"
    assert_refused(ValueError, words, prunus.prune, dense, tmp_path / "out", **given)
