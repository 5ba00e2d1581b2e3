"""The language model inside an image-text model becomes smaller, and nothing else changes."""

import json
from typing import Any

import pytest
import torch

from image_text import IMAGE_TEXT_MODELS, image_text_checkpoint, loaded
from prunus.model.linears import find_block_list
from structure_cases import assert_same_logits, logits, stored
from structure_cases import shrink_without_repair as shrink
from tiny import token_ids


@pytest.mark.parametrize("family", sorted(IMAGE_TEXT_MODELS))
def test_blocks_are_removed_and_all_outside_them_keeps_its_bytes(family, tmp_path):
    dense, ids = image_text_checkpoint(tmp_path / "dense", family), token_ids()
    options = {"blocks": 1, "dtype": "float32", "calibration": ids, "batch": 2}
    record = shrink(dense, tmp_path / "small", **options)
    (gone,) = [step.block for step in record.search]
    model, small = loaded(dense), loaded(tmp_path / "small")
    before = logits(model, ids)
    assert_same_logits(logits(small, ids), logits(model, ids, [gone]), before)
    outside = {
        key: x for key, x in stored(dense).items() if ".layers." not in key or "vision" in key
    }
    found = stored(tmp_path / "small")
    assert all(torch.equal(found[key], x) for key, x in outside.items())
    assert len(outside) > 10
    assert record.config["text_config.num_hidden_layers"] == (2, 1)
    raw = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("dense", "small")]
    assert raw[0]["vision_config"] == raw[1]["vision_config"]
    assert gone == 1 or family != "qwen3_vl"  # the first block is given features of images


def test_blocks_that_are_given_features_of_images_stay(tmp_path):
    dense = image_text_checkpoint(tmp_path / "dense", "qwen3_vl", deepstack_visual_indexes=[0, 1])
    with pytest.raises(NotImplementedError, match=r"block \d of .* cannot be removed: features of"):
        shrink(dense, tmp_path / "small", blocks=1, calibration=token_ids())
    assert not (tmp_path / "small").exists()


def test_an_older_file_has_the_fields_of_the_language_model_next_to_the_others(tmp_path):
    dense = image_text_checkpoint(tmp_path / "dense", "qwen2_vl")
    path = dense / "config.json"
    raw = json.loads(path.read_text())
    text = raw.pop("text_config")
    path.write_text(json.dumps({**{k: v for k, v in text.items() if k != "model_type"}, **raw}))
    options: dict[str, Any] = {"blocks": 1, "calibration": token_ids()}
    shrink(dense, tmp_path / "small", **options)
    assert len(find_block_list(loaded(tmp_path / "small"))[1]) == 1
    assert json.loads((tmp_path / "small" / "config.json").read_text())["num_hidden_layers"] == 1
