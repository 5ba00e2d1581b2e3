"""What the ranks of a run must have decided alike before they start, and what they decide together."""

from __future__ import annotations

import json

from prunus.distributed import Ranks
from prunus.pruning.job import PruningJob
from prunus.pruning.manifest import Manifest
from prunus.pruning.recipe import Recipe
from prunus.pruning.records import Walk

__all__ = ["check_ranks_can_share", "check_same_on_all_ranks"]


def check_same_on_all_ranks(job: PruningJob, manifest: Manifest) -> list[Walk]:
    """See that all ranks are about to do the same; returns how the windows go through each block, on all of them.

    Raises:
        ValueError: they are not; names the rank and what differs.
    """
    ranks = job.ranks
    ranks.set_location("the start")
    mine = {
        "recipe": job.recipe.model_dump(mode="json"),
        **manifest.inputs.model_dump(mode="json", exclude={"dtype_reason", "calibration"}),
        **{key: value for key, value in manifest.versions.items() if key != "python"},
        "state": manifest.state,
    }
    said = [json.loads(text) for text in ranks.gather_text(json.dumps(mine))]
    with ranks.fail_together():
        for rank, its in enumerate(said):
            for key, value in said[0].items():
                if its[key] != value:
                    raise ValueError(
                        f"rank {rank} has another {key} than rank 0 ({its[key]!r}, not {value!r}): all ranks need the "
                        "same options, checkpoint, text and versions, and processors of one kind. --dtype and --batch "
                        "settle what each would decide for itself"
                    )
    # Lockstep where it fits on every rank; replay gives the same bits.
    order: list[Walk] = ["lockstep", "replay", "two_pass"]
    walks = [order.index(job.walk(index)) for index in range(len(job.skeleton))]
    return [order[max(each)] for each in zip(*ranks.gather_ints(walks), strict=True)]


def check_ranks_can_share(recipe: Recipe, ranks: Ranks) -> None:
    """See that what is asked for can be done by several processes together.

    Raises:
        ValueError: says what cannot, and why.
    """
    if ranks.size == 1:
        return
    if recipe.propagate == "block" and recipe.method in ("sparsegpt", "obs"):
        raise ValueError(
            f"--propagate block keeps the original's order of operations for {recipe.method}, window after window: "
            f"{ranks.size} ranks cannot share that. Leave it out, or run one process"
        )
