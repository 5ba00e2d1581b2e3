"""The weights with a row for each token: the input embedding and the output head.

All rules about them are here: which modules have them, whether the two are one weight, under which
names a checkpoint stores it, and whether it can be pruned or rounded.
`Skeleton.vocabulary_weights` hands them on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunus.model.kinds import Kind
from prunus.model.linears import Linear


@dataclass(frozen=True)
class VocabularyWeights:
    """The input embedding and the output head of a transformers model, by their full names.

    Nothing is kept, because reading a checkpoint may untie the two; see `untie`.

    Attributes:
        model: The model.
        kind: What it takes and returns.
    """

    model: Any
    kind: Kind

    @property
    def embedding(self) -> Linear:
        """The input embedding, which looks up the rows of its weight."""
        module = self.model.get_input_embeddings()
        return Linear(next(name for name, x in self.model.named_modules() if x is module), module)

    @property
    def head(self) -> Linear | None:
        """The module that makes logits over the vocabulary; None for a model without one.

        It need not be an `nn.Linear`.
        """
        module = self.model.get_output_embeddings()
        names = (name for name, x in self.model.named_modules() if x is module)
        return next((Linear(name, module) for name in names), None)

    @property
    def head_of_next_token(self) -> Linear | None:
        """The head of a causal language model, which follows the blocks; None for other kinds."""
        return self.head if self.kind.is_causal else None

    @property
    def linear_head(self) -> Linear:
        """The head of a causal language model as a linear.

        Raises:
            NotImplementedError: There is none, or it is no `nn.Linear`.
        """
        head = self.head_of_next_token
        if head is None or not isinstance(head.module, nn.Linear):
            raise NotImplementedError(
                f"{type(self.model).__name__} has no linear as its output head, so its head cannot "
                "be pruned; leave `head` out"
            )
        return head

    @property
    def prunable_head(self) -> Linear:
        """The same, if pruning it does not change the embedding.

        Raises:
            NotImplementedError: As `linear_head`, or the head is tied to the embedding.
        """
        head = self.linear_head
        if self.is_tied:
            raise NotImplementedError(
                f"{head.name} is tied to the input embedding: pruning it would prune the "
                "embedding; leave `head` out"
            )
        return head

    @property
    def own_head(self) -> Linear | None:
        """The head if it is an `nn.Linear` that is not tied to the embedding; else None."""
        head = self.head
        is_linear = head is not None and isinstance(head.module, nn.Linear)
        return head if is_linear and not self.is_tied else None

    @property
    def is_tied(self) -> bool:
        """Whether head and embedding are one weight.

        The configuration may say so of a checkpoint that stores two weights.
        """
        head = self.model.get_output_embeddings()
        return head is not None and head.weight is self.model.get_input_embeddings().weight

    @property
    def rows(self) -> int:
        """The number of rows of the head, or of the embedding without a head."""
        module = self.model.get_output_embeddings() or self.model.get_input_embeddings()
        return int(module.weight.shape[0])

    @property
    def of_logits(self) -> Linear | None:
        """The one whose weight makes the logits, of a tied weight the embedding."""
        return self.embedding if self.is_tied else self.head

    def untie(self, equal: Callable[[str, str], bool]) -> None:
        """Give names that share a parameter one each if their stored numbers differ.

        A configuration may ask for a head that is the embedding, while the checkpoint stores two
        weights. transformers then loads both, and so do all that run this model.

        Args:
            equal: Whether two names of one parameter, of which the first comes first in the model,
                have the same numbers. A name that is not stored is equal to all others.
        """
        first: dict[int, str] = {}
        for name, shared in self.model.state_dict(keep_vars=True).items():
            if not equal(first.setdefault(id(shared), name), name):
                path, _, leaf = name.rpartition(".")
                own = nn.Parameter(torch.empty_like(shared), requires_grad=False)
                setattr(self.model.get_submodule(path), leaf, own)

    def roundable(self, keys: Mapping[str, str]) -> dict[str, list[str]]:
        """Embedding and head, as far as they can have types -> stored names of the weight.

        If they are tied, it is the embedding alone. A checkpoint may store a tied weight twice,
        which are two names, or as the head alone, which stays as it is. Special modules stay too:
        an embedding that computes with its rows, a tied head with a bias.

        Args:
            keys: Name of a weight in the model -> its stored name.
        """
        embedding, head = self.embedding, self.head
        found = {
            x.name: keys[f"{x.name}.weight"]
            for x in (embedding, head)
            if x is not None and f"{x.name}.weight" in keys and _is_plain(x.module)
        }
        if head is None or not self.is_tied:
            return {name: [key] for name, key in found.items() if key.endswith(".weight")}
        plain = _is_table(embedding.module) and _is_plain(head.module) and head.module.bias is None
        is_weight = found.get(embedding.name, "").endswith(".weight")
        return {embedding.name: [*found.values()]} if plain and is_weight else {}


def _is_table(module: nn.Module) -> bool:
    """Whether a module returns rows of its weight, times its `embed_scale` if it has one.

    Classes of transformers that scale rows have a name that ends like this, and one body. Other
    subclasses of `nn.Embedding` may compute anything with their weight.
    """
    scaled = type(module).__name__.endswith("ScaledWordEmbedding")
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and scaled)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module does no more with its weight than multiply by it, or look up its rows."""
    return type(module) is nn.Linear or _is_table(module)
