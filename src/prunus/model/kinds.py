"""The kinds of models that prunus can prune: which transformers class loads one, and its inputs.

A causal language model and an encoder with a masked-language-model head take windows of token ids.
So do the language model inside an image-text model and a classifier of sequences or tokens. An
image classifier takes pixel values. Any other model is refused here, before any work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        name: Name for people.
        loader: Name of the class of transformers that loads it.
        input_name: The argument of its forward that takes a batch.
    """

    name: str
    loader: str
    input_name: str

    def arguments(self, batch: Tensor) -> dict[str, Any]:
        """The keyword arguments of a forward pass on a batch.

        >>> import torch
        >>> MASKED.arguments(torch.tensor([[1, 2]]))
        {'input_ids': tensor([[1, 2]])}
        """
        return {self.input_name: batch} | ({"use_cache": False} if self.is_causal else {})

    @property
    def is_causal(self) -> bool:
        """Whether the model predicts the next token."""
        return self in (CAUSAL, IMAGE_TEXT)


CAUSAL = Kind("causal language model", "AutoModelForCausalLM", "input_ids")
#: Its language model is pruned, on text; what reads images stays as it is.
IMAGE_TEXT = Kind("image-text model", "AutoModelForImageTextToText", "input_ids")
MASKED = Kind("encoder with a masked-language-model head", "AutoModelForMaskedLM", "input_ids")
SEQUENCES = Kind("sequence classifier", "AutoModelForSequenceClassification", "input_ids")
TOKENS = Kind("token classifier", "AutoModelForTokenClassification", "input_ids")
IMAGES = Kind("image classifier", "AutoModelForImageClassification", "pixel_values")

#: The end of errors about models of another kind: what prunus prunes.
_WHAT = (
    "prunus prunes causal language models, also those inside image-text models, encoders with a "
    "masked-language-model head, and classifiers of sequences, tokens and images that are stacks "
    "of blocks. docs/reference/models.md lists them"
)
#: Part of an architecture's name -> kind. The name comes first: one model type may have many heads.
_KINDS_BY_NAME = {
    "ForImageClassification": IMAGES,
    "ForMaskedLM": MASKED,
    "ForSequenceClassification": SEQUENCES,
    "ForTokenClassification": TOKENS,
}
#: Heads that prunus does not know, by the end of an architecture's name.
_OTHER_HEADS = ("ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction")
#: Model types that transformers calls causal language models and that are no row of blocks -> why.
_NO_ROW_OF_BLOCKS = {
    "gemma3n": "passes several streams of hidden states from block to block",
    "gemma3n_text": "passes several streams of hidden states from block to block",
    "rwkv": "rescales hidden states between its blocks",
}


def kind_of(config: Any) -> Kind:
    """The kind of model that a transformers configuration describes.

    Its list of architectures decides. Without one, its model type does: an image classifier or an
    encoder with a masked-language-model head for types that can be nothing else.

    Raises:
        NotImplementedError: The model is of none of the kinds; names its type and the kinds.
    """
    from transformers.models.auto import modeling_auto

    model_type = str(getattr(config, "model_type", type(config).__name__))
    # A damaged config.json can have anything in this field.
    field = getattr(config, "architectures", None)
    listed = [x for x in field if isinstance(x, str)] if isinstance(field, list | tuple) else []
    named = ", ".join(listed) or "no architecture named"
    if getattr(config, "is_encoder_decoder", False) and "CausalLM" not in named:
        raise NotImplementedError(
            f"a model of type {model_type!r} ({named}) has an encoder and a decoder, and its "
            f"decoder takes both text and the output of the encoder; {_WHAT}"
        )
    if model_type in _NO_ROW_OF_BLOCKS:
        raise NotImplementedError(
            f"a model of type {model_type!r} {_NO_ROW_OF_BLOCKS[model_type]}, so it cannot be "
            f"pruned block by block; {_WHAT}"
        )
    for part, kind in _KINDS_BY_NAME.items():
        if part in named:
            return kind
    if model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and (
        not listed or "ForConditionalGeneration" in named
    ):
        return IMAGE_TEXT
    if any(name.endswith(_OTHER_HEADS) for name in listed):
        raise NotImplementedError(
            f"a model of type {model_type!r} ({named}) cannot be pruned with this head; {_WHAT}"
        )
    remote_code = getattr(config, "auto_map", None)
    if remote_code or model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return CAUSAL
    if not listed:
        for kind, model_types in (
            (IMAGES, modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
            (MASKED, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ):
            if model_type in model_types:
                return kind
    raise NotImplementedError(f"a model of type {model_type!r} ({named}) cannot be pruned; {_WHAT}")


def require_causal(config: Any, what: str) -> None:
    """Check that a configuration is of a causal language model, alone or inside another model.

    Args:
        config: A transformers configuration.
        what: The operation that only causal language models support, for the message.

    Raises:
        NotImplementedError: The model is of another kind.
    """
    if not (kind := kind_of(config)).is_causal:
        raise NotImplementedError(
            f"{what} is for causal language models; this is an {kind.name} of type "
            f"{config.model_type!r}"
        )


def image_size(config: Any) -> tuple[int, int]:
    """(height, width) of the images of a classifier, in pixels.

    Raises:
        ValueError: The configuration's `image_size` is neither a number of pixels nor two.

    >>> from types import SimpleNamespace
    >>> image_size(SimpleNamespace(image_size=224))
    (224, 224)
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


def trial_image_size(config: Any) -> tuple[int, int]:
    """(height, width) of the images to try a classifier on, in pixels."""
    # A model with stages has no table of positions, so small images suffice.
    height, width = image_size(config)
    largest = 128 if getattr(config, "hidden_sizes", None) else max(height, width)
    return min(height, largest), min(width, largest)


def image_tokens(config: Any, index: int) -> tuple[int, int]:
    """(positions, width) of the hidden states of one image in block `index`.

    In a transformer the positions are patches and two special tokens, even if the model has only
    one. In a model with stages, each stage halves the height and the width of the grid of patches.
    """
    patch = config.patch_size
    rows, columns = (patch, patch) if isinstance(patch, int) else (int(patch[0]), int(patch[1]))
    height, width = image_size(config)
    widths = getattr(config, "hidden_sizes", None)
    if widths:
        patches = max(1, height // rows >> index) * max(1, width // columns >> index)
        return patches, int(widths[index])
    return (height // rows) * (width // columns) + 2, int(config.hidden_size)
