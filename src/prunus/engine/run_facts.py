"""What is checked and decided for every run of blocks before it does any work.

Whatever would make a run fail later fails here, and nothing is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.calibration.windows import check_context
from prunus.distributed import fail_together, ranks, set_location
from prunus.engine.block_memory import Memory
from prunus.engine.calibration_windows import check_inputs
from prunus.engine.run_options import RunOptions, WindowOptions
from prunus.engine.run_record import RunRecord, Walk
from prunus.engine.session import Session
from prunus.hardware.machine import available_memory, memory_budget, process_memory
from prunus.hardware.numerics import native_bfloat16
from prunus.methods.statistics import Needs
from prunus.model.calls import hidden_of
from prunus.model.checkpoint.output_folder import check_companions, check_disk
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.device import DTYPES, choose_device
from prunus.model.kinds import IMAGES
from prunus.model.open_folder import OpenFolder
from prunus.model.skeleton import Skeleton
from prunus.model.source import (
    CheckpointSource,
    OpenModel,
    WeightSource,
    bound_skeleton,
    open_weights,
)

# Memory that a run leaves to other programs, where the user gives no budget: this share of what is
# free, and at least this many bytes.
_SHARE_FOR_OTHERS, _BYTES_FOR_OTHERS = 0.1, 10**9


def open_model(
    model: str | Path | OpenFolder | nn.Module, options: RunOptions, session: Session
) -> OpenModel:
    """Open a model for a run. No weights are read.

    Args:
        model: A checkpoint folder, which may be open, a hub id, or a loaded model.
        options: The options that only decide how the work is done.
        session: Who hears of a download.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, OSError: The model cannot be read, or
            has no blocks that prunus knows.
    """
    trust = options.trust_remote_code
    if isinstance(model, nn.Module):
        name, device = type(model).__name__, choose_device(options.device, model)
    else:
        name, device = str(model), choose_device(options.device)
        model = open_folder(model, trust, session.tell)
        check_companions(model.path, trust)
    source, skeleton = open_weights(model, trust)
    return OpenModel(name=name, source=source, skeleton=skeleton, device=device)


def run_facts(
    opened: OpenModel,
    recipe: WindowOptions,
    options: RunOptions,
    *,
    needs: Needs,
    needs_inputs: bool,
    adds_ridge: bool = False,
    decided_dtype: str | None = None,
) -> dict[str, Any]:
    """Decide what the recipe leaves open: the fields of a `RunPlan`, but for `batch`.

    It reads no text, and of the weights only those of a dtype trial; see `decide_dtype`.

    Args:
        opened: The model.
        recipe: The options that decide the bytes of the result.
        options: The options that only decide how the work is done.
        needs: The statistics of each linear's inputs that the run collects.
        needs_inputs: Whether the run reads calibration windows at all.
        adds_ridge: Whether the method adds a ridge to Gram matrices that grows with features per
            token, so that rounded inputs do no harm.
        decided_dtype: What `dtype` auto meant in the run that is resumed; None for a new run.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, OSError: The recipe does not fit the
            model.
    """
    source, skeleton, device = opened.source, opened.skeleton, opened.device
    trust = options.trust_remote_code
    if needs_inputs:
        check_inputs(source, recipe, options)
    if skeleton.kind is not IMAGES and needs_inputs:
        check_context(skeleton.max_positions, recipe.seqlen)
    requested = decided_dtype if recipe.dtype == "auto" and decided_dtype else recipe.dtype
    dtype, reason = decide_dtype(
        requested, source, skeleton, device, needs, trust, adds_ridge=adds_ridge
    )
    if dtype != source.stored_dtype:
        skeleton = bound_skeleton(source, trust, dtype)
    if options.memory is not None:
        host_budget = options.memory - process_memory()
    else:
        free = available_memory()
        reserve = max(int(_SHARE_FOR_OTHERS * free), _BYTES_FOR_OTHERS)
        host_budget = max(0, free - reserve) // ranks().local_size
    on_device = memory_budget(device, options.memory) if device.type == "cuda" else host_budget
    memory = Memory(
        budget=on_device,
        host_budget=host_budget,
        on_host=device.type == "cpu",
        reads_files=isinstance(source, CheckpointSource),
    )
    return vars(opened) | {
        "skeleton": skeleton,
        "recipe": recipe,
        "options": options,
        "dtype": dtype,
        "dtype_reason": reason,
        "processes": ranks().size,
        "memory": memory,
        "needs": needs,
        "needs_inputs": needs_inputs,
    }


def check_room(nbytes: int, output: Path) -> None:
    """Check that the disk has `nbytes` for the result, less what an earlier run has written."""
    if output.is_dir():
        nbytes -= sum(path.stat().st_size for path in output.iterdir() if path.is_file())
    check_disk(output, nbytes)


# From the walk that needs most memory to the one that needs least.
_WALKS: tuple[Walk, ...] = ("lockstep", "replay", "two_pass")


def check_same_on_all_ranks(record: RunRecord) -> None:
    """Check that all ranks do the same run, as its record has it. All ranks call it.

    Raises:
        ValueError: A rank has other options, inputs or versions than rank 0; names the first that
            differs. All ranks raise it.
    """
    set_location("the start")
    this_run = {
        "recipe": record.recipe.model_dump(mode="json"),
        **record.inputs.model_dump(mode="json", exclude={"dtype_reason", "calibration"}),
        **{key: value for key, value in record.versions.items() if key != "python"},
        "state": record.state,
    }
    gathered = [json.loads(text) for text in ranks().gather_text(json.dumps(this_run))]
    with fail_together():
        for rank, values in enumerate(gathered):
            for key, value in gathered[0].items():
                if values[key] != value:
                    raise ValueError(
                        f"rank {rank} has another {key} than rank 0 ({values[key]!r}, not "
                        f"{value!r}): all ranks need the same options, checkpoint, text and "
                        "versions, and processors of one kind. `dtype` and `batch` settle what "
                        "each would decide for itself"
                    )


def agreed_walks(walks: Sequence[Walk]) -> list[Walk]:
    """How windows run through each block, on which all ranks agree. All ranks call it.

    Args:
        walks: The walk of each block that this rank would take.

    Returns:
        The walk of each block: of those that the ranks would take, the one that needs least memory.
    """
    by_rank = ranks().gather_ints([_WALKS.index(walk) for walk in walks])
    return [_WALKS[max(block)] for block in zip(*by_rank, strict=True)]


#: Largest relative change of the first block's output at which bfloat16 counts as harmless.
MAX_CHANGE = 0.02
# Token ids of the trial.
_TRIAL_TOKENS = 256


def decide_dtype(
    requested: str,
    source: WeightSource,
    skeleton: Skeleton,
    device: torch.device,
    needs: Needs,
    trust_remote_code: bool = False,
    adds_ridge: bool = False,
) -> tuple[torch.dtype, str]:
    """The dtype of the forward passes, and the reason for it in words.

    It concerns the blocks' own arithmetic only: scores, norms and updates are always float32. On a
    CPU the choice is bfloat16 if the weights are stored in it, if the processor multiplies it
    natively (about 2.5 times as fast as float32), and if it changes the output of the first block
    by less than `MAX_CHANGE` in a trial. Methods that invert a Gram matrix with a small fixed
    damping get float32 on a CPU, because their weight updates amplify small errors.

    Args:
        requested: "auto", or the name of a dtype.
        source: The dense weights.
        skeleton: The model in the stored dtype.
        device: Where blocks run.
        needs: The statistics that the method uses; "gram" for one that inverts a Gram matrix.
        trust_remote_code: Whether transformers may run code that comes with the checkpoint.
        adds_ridge: Whether the method adds a ridge to Gram matrices that grows with features per
            token, so that it needs no float32.
    """
    if requested != "auto":
        return DTYPES[requested], "requested"
    stored = source.stored_dtype
    if device.type == "cuda":
        if stored in (torch.bfloat16, torch.float16):
            return stored, "the checkpoint's own, native on this device"
        return torch.float32, "the checkpoint's own"
    if stored is not torch.bfloat16:
        name = str(stored).removeprefix("torch.")
        return torch.float32, f"the checkpoint is stored in {name}"
    if needs == "gram" and not adds_ridge:
        return torch.float32, "rounding errors of bfloat16 would grow in this method"
    if not native_bfloat16():
        return torch.float32, "this processor has no native bfloat16"
    change = _trial(source, skeleton, trust_remote_code)
    if change < MAX_CHANGE:
        return (
            torch.bfloat16,
            f"native here, and the first block's output changes by {change:.2%} only",
        )
    return torch.float32, f"bfloat16 would change the first block's output by {change:.2%}"


@torch.no_grad()
def _trial(source: WeightSource, stored: Skeleton, trust_remote_code: bool) -> float:
    """How much bfloat16 changes what the first block adds to hidden states; may be infinite.

    It is ‖bfloat16 − float32‖ / ‖float32‖ on token ids spread over the vocabulary.
    """
    outputs = []
    cpu = torch.device("cpu")
    for skeleton in (Skeleton(source.config, torch.float32, trust_remote_code), stored):
        with skeleton.outside_blocks(source.read_outside, cpu):
            hidden, calls = skeleton.record(skeleton.trial_batch(_TRIAL_TOKENS))
        block = skeleton.fill(0, source.block(0), cpu)
        output = hidden_of(block(hidden, *calls[0].args, **calls[0].kwargs))
        # The residual is left out: it is large and would hide the change.
        outputs.append((output - hidden).float())
        skeleton.release(0)
    exact, rounded = outputs
    change = float(
        (rounded - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny)
    )
    return change if math.isfinite(change) else float("inf")
