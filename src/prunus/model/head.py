"""The input embedding and the output head of a model: which they are, and whether they are one.

    is_tied         both have one weight
    tied_embedding  the embedding as a linear, if it is also the head
    head_name       the name of the head
    stored_ends     the names under which a checkpoint stores the weights of both
    end_of_head     which of these is the weight of the head

All take a transformers model, whose weights may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from prunus.model.linears import Linear, is_plain, is_table


def is_tied(model: Any) -> bool:
    """Whether the output head of a transformers model has the weight of its input embedding.

    The configuration may say so of a checkpoint that stores two weights; see `Skeleton.untie`.
    """
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def tied_embedding(model: Any) -> Linear | None:
    """The input embedding of a transformers model as a linear, if it is tied to the output head.

    Returns:
        The embedding by its full name. None if the two are not tied, or if one of them is special:
        an embedding that computes with its rows, a head with a bias.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = is_table(embedding) and type(head) is nn.Linear and head.bias is None
    if not plain or not is_tied(model):
        return None
    return Linear(
        next(name for name, module in model.named_modules() if module is embedding), embedding
    )


def head_name(model: Any) -> str | None:
    """The full name of the output head; None for a model without one."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def stored_ends(model: Any, stored: Mapping[str, str]) -> dict[str, list[str]]:
    """Embedding and head, as far as their weights can have types -> stored names of the weight.

    If they are tied, it is the embedding alone. A checkpoint may store a tied weight twice, which
    are two names, or as the head alone, which stays as it is.

    Args:
        model: The model.
        stored: Name of a tensor in the model -> its name in the checkpoint.
    """
    keys = dict[str, str]()
    names = {id(module): name for name, module in model.named_modules()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        name = names.get(id(module), "")
        if f"{name}.weight" in stored and is_plain(module):
            keys[name] = stored[f"{name}.weight"]
    if not is_tied(model):
        return {name: [key] for name, key in keys.items() if key.endswith(".weight")}
    embedding = tied_embedding(model)
    name = embedding.name if embedding is not None else ""
    return {name: [*keys.values()]} if keys.get(name, "").endswith(".weight") else {}


def end_of_head(model: Any, names: Iterable[str]) -> str | None:
    """The one of these modules that has the weight of the output head, a linear; None for none.

    It is the embedding where both are tied.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    modules = dict(model.named_modules())
    return next((name for name in names if modules[name].weight is head.weight), None)
