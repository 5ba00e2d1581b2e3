"""The statistics of the inputs of every linear of the dense model, block by block.

It is the walk of a run that changes nothing. One block, the hidden states between two blocks, and
the statistics of a few linears are in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from prunus.distributed import own_part, ranks, set_location
from prunus.engine.block.hooks import find_expert_counters
from prunus.engine.block.walks import WALKS, BlockWalk
from prunus.engine.linear_plan import LinearPlan
from prunus.engine.run_facts import agreed_walks
from prunus.engine.run_plan import HashedSource
from prunus.engine.session import Session
from prunus.methods.statistics import InputStatistics, Needs, StatisticsSpec
from prunus.model.linears import Linear
from prunus.model.stream import Stream

#: Is given the full name of a linear, the linear with its dense weight, and its statistics.
Keep = Callable[[str, Linear, InputStatistics], None]


@torch.no_grad()
def collect_statistics(
    plan: LinearPlan,
    session: Session,
    ids: Tensor,
    digests: dict[str, str],
    needs: Needs,
    keep: Keep,
    spill_folder: Path | None = None,
) -> None:
    """Take windows through the dense model, and hand on the statistics of each selected linear.

    Linears with the very same input, such as q, k and v, get the same object. All ranks call it,
    and all get the statistics of all windows.

    Args:
        plan: The run: model, linears, batch size and the walk of each block.
        session: Who hears of the blocks.
        ids: Token ids (windows, tokens), or pixel values (images, channels, height, width).
        digests: Name of a block -> SHA-256 of the weights that the run has read. Missing hashes are
            added.
        needs: The statistics to collect.
        keep: Called once per linear, block by block. The weight belongs to the block, which is
            released afterwards; the statistics may be kept.
        spill_folder: Folder for hidden states, if the plan does not keep them in memory; None
            always keeps them.

    Raises:
        ValueError: Weights or activations are not finite; the message names the tensor.
        FileExistsError: A block is not the one that the run has read before.
        NotImplementedError: A block calls a linear more than once.
    """
    skeleton, memory = plan.skeleton, plan.memory
    stream = Stream(skeleton, HashedSource(plan.source, skeleton, digests), plan.device)
    spec = StatisticsSpec(needs=needs, distributed=ranks().size > 1)
    count = session.preparing("measuring the inputs of each linear", len(skeleton), plan.device)

    def new_statistics(linear: Linear) -> InputStatistics:
        return InputStatistics(linear.shape[1], spec, plan.device)

    with contextlib.closing(stream):
        batches = own_part(ids.split(plan.batch))
        stream.embed(batches, spill_folder if memory.spills else None, memory.hidden_states_stay)
        for index, walk in enumerate(agreed_walks(plan.walks)):
            name, selected = skeleton.block_name(index), plan.selected[index]
            set_location(name)
            module = skeleton.fill(index, stream.source.block(index), plan.device)

            def keep_checked(linear: Linear, inputs: InputStatistics, name: str = name) -> None:
                full_name = f"{name}.{linear.name}"
                inputs.check_finite(full_name)
                keep(full_name, linear, inputs)

            dense = BlockWalk(
                linears=[linear for linear in skeleton.linears(index) if linear.name in selected],
                count=len(stream),
                forward=stream.forward(index, module),
                finish=stream.states.put,
                new_statistics=new_statistics,
                prune=keep_checked,
                expert_counters=find_expert_counters(
                    module, selected, needs, plan.recipe.min_expert_tokens
                ),
            )
            for linear in WALKS[walk](dense):
                # No token reached it.
                empty = new_statistics(linear)
                empty.complete()
                keep_checked(linear, empty)
            skeleton.release(index)
            count(1)
