"""Which type each weight gets, so that a file has a given size; and the command that rounds.

Every type of a weight takes some bytes and raises the loss of the model. For a sum of bytes the sum
of the losses is least where one more byte would save as much loss in every weight (Lagrange). So
all weights start with their smallest type. The step to another type that saves the most loss per
byte is taken first, along the convex hull of each weight's types, as long as it fits.

Shape suffixes: O outputs (rows), R some of them, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunus.formats.gguf.types import TYPES
from prunus.methods.group_fits import round_in_groups
from prunus.methods.group_quantizer import GroupedWeight, GroupQuantizer
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import Quantized
from prunus.pruning.block.linear import Stored
from prunus.pruning.job import PruningJob
from prunus.pruning.loss_sensitivity import LinearSensitivity
from prunus.pruning.manifest import PruningRecord
from prunus.pruning.output import PruningOutput
from prunus.pruning.run import PruneVerb

# The rows that are rounded to every type: of a weight, or of several with one type, and of each.
_ROWS, _LEAST_ROWS = 64, 8


class Choice(NamedTuple):
    """A type of a weight: its bytes in the file, and what it adds to the loss."""

    kind: str
    nbytes: int
    loss: float = 0.0


def type_losses(
    weight_OI: Tensor, uses: Sequence[LinearSensitivity], kinds: Sequence[str], stacked: int = 1
) -> tuple[Tensor, Tensor]:
    """How much errors in each column raise the loss (I,), and by how much each type does.

    `uses` has what is known of each module with this weight: an embedding may be the head too.
    Some rows stand for all, in proportion to what errors in them cost, and fewer if the weight is
    one of several (`stacked`) that have one type.
    """
    rows = max(_LEAST_ROWS, _ROWS // stacked)
    some_R = torch.arange(0, len(weight_OI), max(1, len(weight_OI) // rows))
    rows_RI, losses = weight_OI[some_R].float(), []
    importance_I = torch.stack([use.loss_O.sum() * use.importance_I for use in uses]).sum(dim=0)
    for kind in kinds:
        rounded = round_in_groups(rows_RI, TYPES[kind], importance_I)
        error_RI = rounded.dense().sub_(rows_RI).square_()
        parts = [error_RI @ use.importance_I @ use.loss_O[some_R] for use in uses]
        shares = [use.loss_O.sum() / use.loss_O[some_R].sum() for use in uses]
        losses.append(sum(part * share for part, share in zip(parts, shares, strict=True)))
    return importance_I, torch.tensor(losses)


def choose_types(choices: Mapping[str, Sequence[Choice]], nbytes: int) -> dict[str, str]:
    """The types of least loss whose bytes add up to at most `nbytes`.

    >>> narrow, wide = Choice("Q3_K", 3, 9.0), Choice("Q6_K", 6, 1.0)
    >>> choose_types({"a": [narrow, wide], "b": [narrow, wide._replace(loss=5.0)]}, 9)
    {'a': 'Q6_K', 'b': 'Q3_K'}
    """
    chosen = {name: min(each, key=lambda x: (x.nbytes, x.loss)) for name, each in choices.items()}
    left = nbytes - sum(each.nbytes for each in chosen.values())
    while True:
        steps = [
            ((now.loss - each.loss) / more, name, each)
            for name, now in chosen.items()
            for each in choices[name]
            if each.loss < now.loss and 0 < (more := each.nbytes - now.nbytes) <= left
        ]
        if not steps:
            return {name: each.kind for name, each in chosen.items()}
        _, name, each = max(steps)
        left -= each.nbytes - chosen[name].nbytes
        chosen[name] = each


class GroupVerb(PruneVerb):
    """Rounds each linear by its quantiser in `quantizers`; see `prunus.pruning.block.linear`."""

    def __init__(self) -> None:
        self.quantizers: dict[str, GroupQuantizer] = {}

    def finish_linear(
        self, job: PruningJob, ids: torch.Tensor, output: PruningOutput, record: PruningRecord
    ) -> GroupVerb:
        return self

    def begin(self, name: str, statistics: InputStatistics) -> GroupQuantizer:
        return self.quantizers[name]

    def end(self, name: str, quantized: Quantized | GroupedWeight) -> tuple[Stored, dict[str, Any]]:
        assert isinstance(quantized, GroupedWeight)
        return quantized, {"bits": quantized.quantizer.bits}
