"""Where a model keeps its blocks.

transformers itself says so: `_no_split_modules` names the classes that must stay on one device, and
the blocks of a decoder are a module list of such classes. The table below is for models where that
is not enough.
"""

from __future__ import annotations

from typing import Any

from torch import nn

#: model_type -> path of the module list, for models whose own declaration is missing or ambiguous.
BLOCK_LISTS: dict[str, str] = {
    "convnextv2": "convnextv2.encoder.stages",
    "distilbert": "distilbert.transformer.layer",
    "electra": "electra.encoder.layer",
    "mpnet": "mpnet.encoder.layer",
    "roformer": "roformer.encoder.layer",
}


def find_block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the module list of a model's transformer blocks, or of its stages."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type in BLOCK_LISTS:
        path = BLOCK_LISTS[model_type]
        blocks = model.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        return path, blocks
    block_classes = set(getattr(model, "_no_split_modules", None) or ())
    stacks = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(type(child).__name__ in block_classes for child in module)
    }
    # A stage of ConvNeXt holds a list of layers itself. The outer list counts: a block is a stage,
    # with the downsampling before its layers.
    stacks = {
        path: module
        for path, module in stacks.items()
        if not any(path.startswith(f"{other}.") for other in stacks)
    }
    if len(stacks) > 1 and (decoder := _decoder_path(model)):
        # An image-text model: its language model is one of several towers.
        stacks = {path: x for path, x in stacks.items() if path.startswith(f"{decoder}.")} or stacks
    if not stacks:
        raise NotImplementedError(
            f"no transformer blocks found in {type(model).__name__} (model type {model_type!r}): "
            "none of its module lists consists of "
            f"{sorted(block_classes) or 'declared block classes'}. docs/how-to/add-a-family.md "
            "says how to name the list of such a model"
        )
    if len(stacks) > 1:
        raise NotImplementedError(
            f"{type(model).__name__} has several stacks of blocks ({', '.join(stacks)}); prunus "
            "prunes models with one. docs/how-to/add-a-family.md says how to name the one to prune"
        )
    return next(iter(stacks.items()))


def _decoder_path(model: Any) -> str | None:
    """Path of the module that transformers calls the decoder of a model, if it is a part of it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return next((path for path, x in model.named_modules() if path and x is decoder), None)
