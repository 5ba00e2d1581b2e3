"""What the ranks of a run check before they start, and what they decide together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol

from prunus.distributed import Ranks
from prunus.pruning.job import PruningJob
from prunus.pruning.manifest import RunInputs
from prunus.pruning.recipe import Recipe
from prunus.pruning.records import Walk

__all__ = ["check_ranks_can_share", "check_same_on_all_ranks"]


class Record(Protocol):
    """What records of all kinds of run say about the run."""

    @property
    def inputs(self) -> RunInputs: ...

    @property
    def versions(self) -> Mapping[str, str]: ...

    @property
    def state(self) -> str: ...


# From the walk that needs most memory to the one that needs least.
_WALKS: tuple[Walk, ...] = ("lockstep", "replay", "two_pass")


def check_same_on_all_ranks(job: PruningJob, manifest: Record) -> list[Walk]:
    """Check that all ranks are about to do the same run. All ranks must call this.

    Args:
        job: This rank's job.
        manifest: This rank's manifest, or record of another kind of run.

    Returns:
        Per block the walk that all ranks use: lockstep only where it fits on every rank. Replay
        gives the same bits.

    Raises:
        ValueError: The ranks differ; names one of them and what differs.
    """
    ranks = job.ranks
    ranks.set_location("the start")
    own = {
        "recipe": job.recipe.model_dump(mode="json"),
        **manifest.inputs.model_dump(mode="json", exclude={"dtype_reason", "calibration"}),
        **{key: value for key, value in manifest.versions.items() if key != "python"},
        "state": manifest.state,
    }
    gathered = [json.loads(text) for text in ranks.gather_text(json.dumps(own))]
    with ranks.fail_together():
        for rank, values in enumerate(gathered):
            for key, value in gathered[0].items():
                if values[key] != value:
                    raise ValueError(
                        f"rank {rank} has another {key} than rank 0 ({values[key]!r}, not "
                        f"{value!r}): all ranks need the same options, checkpoint, text and "
                        "versions, and processors of one kind. --dtype and --batch settle what "
                        "each would decide for itself"
                    )
    own_walks = [_WALKS.index(job.walk(index)) for index in range(len(job.skeleton))]
    return [_WALKS[max(block)] for block in zip(*ranks.gather_ints(own_walks), strict=True)]


def check_ranks_can_share(recipe: Recipe, ranks: Ranks) -> None:
    """Check that several processes can carry out a recipe together.

    Raises:
        ValueError: They cannot; says why.
    """
    if ranks.size == 1:
        return
    if recipe.propagate == "block" and recipe.method in ("sparsegpt", "obs"):
        raise ValueError(
            f"--propagate block keeps the original's order of operations for {recipe.method}, "
            f"window after window: {ranks.size} ranks cannot share that. Leave it out, or run one "
            "process"
        )
