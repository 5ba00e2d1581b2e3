"""What the ranks of a run check before they start, and what they decide together."""

from __future__ import annotations

import json

from prunus.runs.job import RunJob
from prunus.runs.record import RunRecord, Walk

# From the walk that needs most memory to the one that needs least.
_WALKS: tuple[Walk, ...] = ("lockstep", "replay", "two_pass")


def check_same_on_all_ranks(job: RunJob, record: RunRecord) -> list[Walk]:
    """Check that all ranks are about to do the same run. All ranks must call this.

    Returns:
        Per block the walk that all ranks use: lockstep only where it fits on every rank. Replay
        gives the same bits.
    """
    ranks = job.ranks
    ranks.set_location("the start")
    own = {
        "recipe": job.recipe.model_dump(mode="json"),
        **record.inputs.model_dump(mode="json", exclude={"dtype_reason", "calibration"}),
        **{key: value for key, value in record.versions.items() if key != "python"},
        "state": record.state,
    }
    gathered = [json.loads(text) for text in ranks.gather_text(json.dumps(own))]
    with ranks.fail_together():
        for rank, values in enumerate(gathered):
            for key, value in gathered[0].items():
                if values[key] != value:
                    raise ValueError(
                        f"rank {rank} has another {key} than rank 0 ({values[key]!r}, not "
                        f"{value!r}): all ranks need the same options, checkpoint, text and "
                        "versions, and processors of one kind. `dtype` and `batch` settle what "
                        "each would decide for itself"
                    )
    own_walks = [_WALKS.index(job.walk(index)) for index in range(len(job.skeleton))]
    return [_WALKS[max(block)] for block in zip(*ranks.gather_ints(own_walks), strict=True)]
