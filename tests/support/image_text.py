"""Tiny random image-text models, with a tokenizer of bytes."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText

from tiny import COMMON, SIZES
from tiny_tokenizer import VOCABULARY, byte_tokenizer

_TEXT: dict[str, Any] = COMMON | {"vocab_size": VOCABULARY, "max_position_embeddings": 128}
#: A vision tower.
VISION: dict[str, Any] = SIZES | {"image_size": 16, "patch_size": 8}
_QWEN_TEXT = _TEXT | {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
}
_QWEN_VISION: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4}

#: Model type -> class of the configuration, options of its language model and of its vision tower.
IMAGE_TEXT_MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VLConfig", _QWEN_TEXT, _QWEN_VISION | {"embed_dim": 32, "mlp_ratio": 2}),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        _QWEN_TEXT,
        _QWEN_VISION | {"out_hidden_size": 32, "intermediate_size": 64},
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        _QWEN_TEXT | {"head_dim": 8},
        _QWEN_VISION
        | {"out_hidden_size": 32, "intermediate_size": 64, "deepstack_visual_indexes": [0]},
    ),
    "gemma3": (
        "Gemma3Config",
        _TEXT | {"head_dim": 8, "sliding_window": 16},
        VISION | {"model_type": "siglip_vision_model"},
    ),
    "llava": (
        "LlavaConfig",
        _TEXT | {"model_type": "llama"},
        VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
    ),
    "smolvlm": ("SmolVLMConfig", _TEXT | {"model_type": "llama"}, VISION),
    "idefics3": ("Idefics3Config", _TEXT | {"model_type": "llama"}, VISION),
    "mistral3": (
        "Mistral3Config",
        _TEXT | {"model_type": "mistral"},
        VISION | {"model_type": "pixtral"},
    ),
    "internvl": ("InternVLConfig", _TEXT | {"model_type": "qwen2"}, VISION),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "gemma3": {"mm_tokens_per_image": 4},
    "smolvlm": {"scale_factor": 1},
    "idefics3": {"scale_factor": 1},
}


def image_text_checkpoint(folder: Path, family: str, **tower: Any) -> Path:
    """Write a tiny model of a family, under the names that its published checkpoints use.

    `tower` are further options of its vision tower.
    """
    name, text, vision = IMAGE_TEXT_MODELS[family]
    config = getattr(transformers, name)(
        text_config=text, vision_config=vision | tower, **_OPTIONS.get(family, {})
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def loaded_with_images(folder: Path) -> Any:
    """The model of a folder, as a user of transformers loads it."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
