"""What kinds of models there are for prunus: which transformers class loads one, and what it is given.

A causal language model and an encoder with a masked-language-model head take windows of token ids, an image classifier
takes pixel values. Everything else is refused here, by name, before any work.

Shape suffixes: N samples, S tokens of a window, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "CAUSAL",
    "IMAGES",
    "MASKED",
    "Kind",
    "image_size",
    "image_tokens",
    "kind_of",
    "require_causal",
]


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        name: in words.
        loader: transformers' class that loads it.
        takes: the argument of its forward that holds a batch.
    """

    name: str
    loader: Literal[
        "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForImageClassification"
    ]
    takes: Literal["input_ids", "pixel_values"]

    def arguments(self, batch: Tensor) -> dict[str, Any]:
        """The keyword arguments of a forward pass on a batch."""
        return {self.takes: batch} | ({"use_cache": False} if self is CAUSAL else {})

    def smallest(self, config: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A batch that the model takes and that costs next to nothing: two tokens, or one black image."""
        if self is not IMAGES:
            return torch.zeros((1, 2), dtype=torch.int64, device=device)
        return torch.zeros(
            (1, config.num_channels, *_trial_size(config)), dtype=dtype, device=device
        )

    def spread(self, config: Any, rows: int, tokens: int) -> Tensor:
        """A batch that reaches much of a model, always the same: `tokens` of all `rows` ids, or four images of noise."""
        if self is not IMAGES:
            return torch.linspace(0, rows - 1, tokens).long().unsqueeze(0)
        noise = torch.Generator().manual_seed(0)
        return torch.randn((4, config.num_channels, *_trial_size(config)), generator=noise)


CAUSAL = Kind("causal language model", "AutoModelForCausalLM", "input_ids")
MASKED = Kind("encoder with a masked-language-model head", "AutoModelForMaskedLM", "input_ids")
IMAGES = Kind("image classifier", "AutoModelForImageClassification", "pixel_values")


def kind_of(config: Any) -> Kind:
    """The kind of model that a transformers configuration describes.

    Raises:
        NotImplementedError: none that can be pruned; names the model type and what can.
    """
    from transformers.models.auto import modeling_auto

    model_type = str(getattr(config, "model_type", type(config).__name__))
    listed = getattr(config, "architectures", None)
    listed = (
        [name for name in listed if isinstance(name, str)]
        if isinstance(listed, list | tuple)
        else []
    )
    named = ", ".join(listed) or "no architecture named"
    if getattr(config, "is_encoder_decoder", False) and "CausalLM" not in named:
        raise NotImplementedError(
            f"a model of type {model_type!r} ({named}) has an encoder and a decoder that takes both text and what the "
            f"encoder makes; {_WHAT}"
        )
    if "ForImageClassification" in named:
        return IMAGES
    if "ForMaskedLM" in named:
        return MASKED
    if model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(
        config, "auto_map", None
    ):
        return CAUSAL
    if not listed:
        for kind, known in (
            (IMAGES, modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
            (MASKED, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ):
            if model_type in known:
                return kind
    raise NotImplementedError(f"a model of type {model_type!r} ({named}) cannot be pruned; {_WHAT}")


_WHAT = (
    "prunus prunes causal language models, encoders with a masked-language-model head and image classifiers that are "
    "stacks of blocks. docs/zoo.md lists them"
)


def require_causal(config: Any, what: str) -> None:
    """See that a configuration is of a causal language model, for what only these can do.

    Raises:
        NotImplementedError: it is of another kind; `what` names what was asked for.
    """
    if (kind := kind_of(config)) is not CAUSAL:
        raise NotImplementedError(
            f"{what} is for causal language models; this is an {kind.name} of type {config.model_type!r}"
        )


def image_size(config: Any) -> tuple[int, int]:
    """(height, width) in pixels.

    Raises:
        ValueError: the configuration's `image_size` is neither a number of pixels nor two.
    """
    size = getattr(config, "image_size", None)
    sides = (size, size) if isinstance(size, int) else size
    if not (
        isinstance(sides, list | tuple)
        and len(sides) == 2
        and all(isinstance(x, int) and x > 0 for x in sides)
    ):
        raise ValueError(
            f"image_size in the configuration must be pixels, or [height, width]; got {size!r}"
        )
    return sides[0], sides[1]


def _trial_size(config: Any) -> tuple[int, int]:
    """As `image_size`; models without a table of positions do with less, whatever their configuration says."""
    height, width = image_size(config)
    return (
        (min(height, 128), min(width, 128))
        if getattr(config, "hidden_sizes", None)
        else (height, width)
    )


def image_tokens(config: Any, index: int) -> tuple[int, int]:
    """(positions, width) of the hidden states of one image in block `index`; stages halve the sides of the grid."""
    patch = config.patch_size
    rows, columns = (patch, patch) if isinstance(patch, int) else (int(patch[0]), int(patch[1]))
    height, width = image_size(config)
    widths = getattr(config, "hidden_sizes", None)
    if widths:
        return max(1, height // rows >> index) * max(1, width // columns >> index), int(
            widths[index]
        )
    return (height // rows) * (width // columns) + 2, int(config.hidden_size)
