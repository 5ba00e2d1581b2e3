"""The image processor that lies beside an image classifier's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from prunus.model.config_limits import check_config, check_processor_files

__all__ = ["load_image_processor"]


def load_image_processor(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers image processor of a checkpoint folder.

    It resizes and normalises by Pillow, so that every host computes the same pixel values.

    Raises:
        ValueError: there is none, a number in its files is beyond all limits, or it cannot be
            loaded; quotes the reason in one line.
    """
    check_config(folder)
    check_processor_files(folder)
    try:
        return AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers raises errors of many kinds for missing or bad files
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder}: no image processor could be loaded ({type(error).__name__}: {reason}); add "
            "its preprocessor_config.json beside the weights"
        ) from error
