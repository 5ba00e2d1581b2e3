"""A child process of the rank tests, which forks the ranks of every case.

It has imported torch already, so that each rank starts at once.

python rank_cases.py SCRATCH CASE…     prints one JSON line: the result of each case
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

torch.set_num_threads(1)

import prunus  # noqa: E402, I001
from prunus.engine.block_memory import Memory  # noqa: E402
from prunus.rounding.compression_record import CompressionRecord  # noqa: E402
from prunus.distributed import on_rank_0, process_group, ranks, sum_floats  # noqa: E402
from prunus.engine.block import dense_stream  # noqa: E402
from prunus.engine.reconstruction import output_loss  # noqa: E402
from prunus.pruning.manifest import Manifest  # noqa: E402
from prunus.engine.reconstruction.reconstruct_block import ReconstructionBatches  # noqa: E402
from prunus.structure.structure_record import StructureRecord  # noqa: E402
from ranks import answers, forked, in_ranks  # noqa: E402
from stopping import StopError, stop_after  # noqa: E402
from tiny import block_shards, ids_file, shards, stored, tiny_checkpoint, token_ids  # noqa: E402

METHODS: dict[str, dict[str, Any]] = {
    "wanda": {"dtype": "auto"},
    "two passes": {"propagate": "block"},
    "allocation": {"allocation": "fisher"},
    "owl": {"allocation": "owl"},
    "sparsegpt 2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "obs": {"method": "obs", "mask_order": "blockwise", "mask_from": "magnitude"},
    "alps, dense targets": {"method": "alps", "dense_weight": 0.25},
    "least squares": {"weight_update": "least-squares"},
}


def prune(dense: Path, out: Path, **options: Any) -> Any:
    # A dtype that is given saves each rank the trial that would choose one.
    arguments = {"calibration": token_ids(), "batch": 1, "rank_timeout": 60.0, "dtype": "float32"}
    verb = prunus.compress if "bits" in options else prunus.prune
    return verb(dense, out, **(arguments | options))


def compare(left: Path, right: Path) -> dict[str, Any]:
    """The share of mask bits and the largest weight that differ, and whether files are equal."""
    a, b = stored(left), stored(right)
    assert a.keys() == b.keys()
    bits = sum(int(((a[k] == 0) != (b[k] == 0)).sum()) for k in a)
    return {
        "masks": bits / sum(x.numel() for x in a.values()),
        "weights": max(float((a[k].float() - b[k].float()).abs().max()) for k in a),
        "bytes": shards(left) == shards(right),
    }


def on_two(work: Callable[[], object]) -> None:
    """Run `work` on two ranks, which must end well."""
    status = in_ranks(2, lambda _: work())
    assert status == [0, 0], status


def against_one(dense: Path, scratch: Path, name: str, size: int, **options: Any) -> dict[str, Any]:
    prune(dense, scratch / f"{name} one", **options)
    status = in_ranks(size, lambda _: prune(dense, scratch / name, **options))
    assert not any(status), (name, status)
    return compare(scratch / f"{name} one", scratch / name)


def fault_of(work: Callable[[], object]) -> str | None:
    try:
        work()
    except (ValueError, RuntimeError) as fault:
        return f"{type(fault).__name__}: {fault}"
    return None


def methods(scratch: Path) -> dict[str, Any]:
    """Two ranks against one, for every kind of method and option."""
    dense = tiny_checkpoint(scratch / "dense", "llama", torch.bfloat16)
    return {name: against_one(dense, scratch, name, 2, **more) for name, more in METHODS.items()}


def compressed(scratch: Path) -> dict[str, Any]:
    """Two ranks against one, twice; and a run of one rank that two ranks go on with."""
    wider = {"hidden_size": 64, "intermediate_size": 128}
    dense = tiny_checkpoint(scratch / "dense", "llama", torch.bfloat16, **wider)
    options = {"bits": 4.5, "format": "mlx", "reconstruct": "all"}

    def alone(name: str, **more: Any) -> None:
        prune(dense, scratch / name, **options, **more)

    alone("one")
    on_two(lambda: alone("two"))
    on_two(lambda: alone("again"))
    with contextlib.suppress(StopError):
        alone("resumed", progress=stop_after(1))
    first = (scratch / "resumed" / "model-00001-of-00003.safetensors").read_bytes()
    on_two(lambda: alone("resumed"))
    names = ("one", "two", "resumed")
    totals = {name: CompressionRecord.load(scratch / name).totals for name in names}
    return {
        "bits": {name: each["bits"] for name, each in totals.items()},
        "errors": {name: each["mean_relative_output_error"] for name, each in totals.items()},
        "again": compare(scratch / "two", scratch / "again")["bytes"],
        "kept": (scratch / "resumed" / "model-00001-of-00003.safetensors").read_bytes() == first,
        "left": [path.name for path in (scratch / "resumed").glob("sensitivity*")],
    }


def shrunk(scratch: Path) -> dict[str, Any]:
    """Two ranks against one, and a run of one rank that two ranks go on with."""
    dense = tiny_checkpoint(
        scratch / "dense", "mixtral", torch.bfloat16, num_hidden_layers=3, initializer_range=0.2
    )
    cases: dict[str, dict[str, Any]] = {
        "chosen": {"blocks": 2, "experts": 2, "repair": False},
        "trained": {"blocks": 2, "experts": 2, "batch": 2},
    }

    def shrink(name: str, case: str, **more: Any) -> None:
        given = {"calibration": token_ids(6), "batch": 1, "rank_timeout": 60.0, "dtype": "float32"}
        prunus.shrink(dense, scratch / name, **(given | cases[case] | more))

    for case in cases:
        shrink(f"{case} one", case)
        on_two(lambda: shrink(f"{case} two", case))  # noqa: B023
    with contextlib.suppress(StopError):
        shrink("resumed", "chosen", progress=stop_after(1))
    on_two(lambda: shrink("resumed", "chosen"))
    found: dict[str, Any] = {
        "chosen": compare(scratch / "chosen one", scratch / "chosen two")["bytes"]
    }
    found["resumed"] = compare(scratch / "chosen one", scratch / "resumed")["bytes"]
    for end in ("one", "two"):
        record = StructureRecord.load(scratch / f"trained {end}")
        found[end] = {
            "blocks": [block.made_from for block in record.blocks],
            "errors": [block.repair and block.repair.error_after for block in record.blocks],
        }
    return found


def messages(scratch: Path) -> dict[str, Any]:
    """What three ranks receive, and how many work together: in what rank 0 does, joined, after."""
    texts = [["", "a", "ä" * 124], ["", "b" * 249, ""], ["x" * 248, "y" * 5000, "é" * 300]]

    def receive(_rank: int) -> dict[str, Any]:
        with process_group(60) as three, process_group(60) as again:
            received = [three.gather_text(each[three.rank]) for each in texts]
            totals = sum_floats([three.rank, 0.5])
            rows = three.all_gather(torch.full((three.rank, 2), float(three.rank)).bfloat16())
            sizes = [on_rank_0(lambda: ranks().size), again.size, ranks().size]
        return {
            "same": received == texts,
            "totals": totals,
            "rows": rows.tolist(),
            "sizes": [*sizes, ranks().size],
        }

    return dict(enumerate(answers(3, receive, scratch)))


def uneven(scratch: Path) -> dict[str, Any]:
    """Uneven shares, ranks without windows, and experts that no window of a rank reaches."""
    routed = tiny_checkpoint(scratch / "routed", "qwen3_moe", torch.bfloat16)
    found = {}
    for name, size, windows in (("5 windows on 3", 3, 5), ("2 windows on 3", 3, 2)):
        options = {"calibration": token_ids(windows), "min_expert_tokens": 3 * windows}
        found[name] = against_one(routed, scratch, name, size, **options)
        totals = Manifest.load(scratch / name).totals
        assert 0 < totals["expert_linears_measured_on_all"] < totals["expert_linears"]
    # Each window of two tokens reaches other experts, whichever walk leads through the block.
    options = {"calibration": token_ids(5, 2), "min_expert_tokens": 0}
    for name in ("lockstep", "replay", "two_pass"):
        propagate = "block" if name == "two_pass" else "linear"
        fits = name == "lockstep"
        with mock.patch.object(Memory, "fits_lockstep", return_value=fits):
            found[name] = against_one(routed, scratch, name, 3, propagate=propagate, **options)
        first = Manifest.load(scratch / name).blocks[0]
        assert first.walk == name
        assert any("unreached" in linear.notes for linear in first.linears.values())
    return found


def reconstructed(scratch: Path) -> dict[str, Any]:
    """Blocks trained by several ranks against one.

    With one window per step all ranks compute the same. With several they split the windows.
    """
    output_loss.CHUNK_TOKENS = 6  # the logits of a window are computed in three pieces
    # Low enough that one batch in four runs through the dense model where the method allows it.
    dense_stream._TOKENS_PER_FEATURE = 0.1
    llama = tiny_checkpoint(scratch / "dense", "llama", torch.bfloat16)
    routed = tiny_checkpoint(scratch / "routed", "qwen3_moe", torch.bfloat16)
    every_block = {"reconstruct": "all", "reconstruct_epochs": 2}
    best = {"method": "alps", "dense_weight": 0.25}
    last = {"reconstruct": "last"}
    cases: dict[str, tuple[Path, int, int, dict[str, Any]]] = {
        "one window per step": (llama, 2, 6, {}),
        "more ranks than windows": (llama, 3, 2, {}),
        "split": (llama, 2, 7, {"batch": 2}),  # the last step has one window
        "split, best, 2:4": (llama, 3, 16, best | {"batch": 4, "pattern": "2:4"}),
        "split, experts": (routed, 2, 6, {"batch": 2}),
        "last only, one batch in four": (llama, 3, 21, best | last),
    }
    found = {}
    for name, (dense, size, windows, more) in cases.items():
        options = {"calibration": token_ids(windows), **every_block, **more}
        same = against_one(dense, scratch, name, size, **options)
        alone, several = (
            [block.reconstruction for block in Manifest.load(scratch / folder).blocks]
            for folder in (f"{name} one", name)
        )
        found[name] = {
            "before": [block.error_before for block in alone if block],
            "alone": [block.error_after for block in alone if block],
            "several": [block.error_after for block in several if block],
            "steps": [block.steps if block else 0 for block in several],
            **same,
        }

    def killed_in_training(rank: int) -> None:
        original = ReconstructionBatches.get

        def get(batches: Any, batch: int) -> torch.Tensor:
            if rank == 1 and block_shards(scratch / "killed"):  # one is written
                os.kill(os.getpid(), signal.SIGKILL)
            return original(batches, batch)

        ReconstructionBatches.get = get  # type: ignore[method-assign]
        fault = fault_of(lambda: prune(llama, scratch / "killed", **every_block, rank_timeout=5.0))
        (scratch / f"killed {rank}").write_text(str(fault))

    in_ranks(2, killed_in_training)
    blocks = len(block_shards(scratch / "killed"))
    status = in_ranks(3, lambda _: prune(llama, scratch / "killed", **every_block, resume=True))
    assert not any(status), status
    found["killed"] = {
        "messages": (scratch / "killed 0").read_text(),
        "blocks": blocks,
        **compare(scratch / "one window per step one", scratch / "killed"),
    }
    return found


def refused(scratch: Path) -> dict[str, Any]:
    """What several processes cannot do, or what is wrong on one, fails before any work."""
    dense = tiny_checkpoint(scratch / "dense", "llama", torch.bfloat16)
    cases: dict[str, dict[int, dict[str, Any]]] = {
        "original": {0: {"method": "sparsegpt", "propagate": "block"}},
        "other options": {0: {"sparsity": 0.5}, 1: {"sparsity": 0.6}},
    }
    found = {}
    for name, options in cases.items():

        def work(rank: int, name: str = name, options: Any = options) -> str | None:
            own = options.get(rank, options[0])
            return fault_of(lambda: prune(dense, scratch / name, **own))

        errors = answers(2, work, scratch)
        found[name] = {"errors": errors, "left": (scratch / name).exists()}
    return found


def lost(scratch: Path) -> dict[str, Any]:
    """A rank is killed, is stopped or fails: the others end.

    The run can be resumed with any number of ranks.
    """
    dense = tiny_checkpoint(scratch / "dense", "llama", torch.bfloat16, num_hidden_layers=4)
    prune(dense, scratch / "whole")
    found = {}
    for name, act in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP), ("error", None)):
        out = scratch / name

        def work(rank: int, name: str = name, act: Any = act, out: Path = out) -> None:
            from prunus.engine.block.change_block import BlockChanger

            original = BlockChanger.change_block

            def prune_block(engine: Any, index: int, *rest: Any) -> Any:
                if rank == 1 and index == 2:
                    if act is None:
                        raise ValueError("no good")
                    os.kill(os.getpid(), act)
                return original(engine, index, *rest)

            BlockChanger.change_block = prune_block  # type: ignore[method-assign]
            began = time.monotonic()
            try:
                prune(dense, out, rank_timeout=3.0)
            except RuntimeError as fault:
                (scratch / f"{name} {rank}").write_text(
                    json.dumps([str(fault), time.monotonic() - began, type(fault).__name__])
                )

        with contextlib.redirect_stderr(io.StringIO()), forked(3, work) as children:
            for rank in (0, 2):
                os.waitpid(children[rank], 0)
            os.kill(children[1], signal.SIGKILL) if act is signal.SIGSTOP else None
        # Resume with another number of ranks.
        blocks = len(block_shards(out))
        size = {"killed": 2, "stopped": 1, "error": 3}[name]
        status = in_ranks(size, lambda _, out=out: prune(dense, out, resume=True))
        found[name] = {
            "messages": [json.loads((scratch / f"{name} {rank}").read_text()) for rank in (0, 2)],
            "blocks": blocks,
            "status": status,
            **compare(scratch / "whole", out),
        }
    return found


def evaluated(scratch: Path) -> dict[str, Any]:
    """Perplexity over ranks, also over more ranks than windows."""

    from prunus.evaluation.perplexity import perplexity

    dense = tiny_checkpoint(scratch / "dense", "llama", torch.bfloat16)
    text = ids_file(scratch / "text.safetensors", 2, 32)
    found: dict[str, Any] = {"alone": perplexity(dense, str(text), seqlen=32).loss}
    reference = tiny_checkpoint(scratch / "reference", "llama", initializer_range=0.3)

    def compared() -> dict[str, Any]:
        result = perplexity(dense, str(text), seqlen=32, reference=reference)
        return result.as_dict()["divergence"]

    found["compared"] = [compared()]

    def score(_rank: int) -> list[Any]:
        with process_group(60):
            loss = perplexity(dense, str(text), seqlen=32).loss
            return [loss, compared()]

    for size in (2, 3):
        scores = answers(size, score, scratch)
        found[str(size)] = [loss for loss, _ in scores]
        found["compared"] += [divergence for _, divergence in scores]
    return found


def recovered(scratch: Path) -> dict[str, Any]:
    """A training whose steps two ranks split by windows, against one rank."""

    dense = tiny_checkpoint(scratch / "dense", "llama", torch.bfloat16)
    pruned, text = scratch / "pruned", ids_file(scratch / "text.safetensors", 40, 16)
    prune(dense, pruned)
    options = {
        "text": str(text),
        "tokens": 16 * 4 * 6,
        "seqlen": 16,
        "batch": 4,
        "held_out": 3,
        "evaluations": 2,
    }
    options |= {"dtype": "float32", "teacher": dense, "rank_timeout": 60.0}

    def train(out: Path, **more: Any) -> Any:
        return prunus.recover(pruned, out, "masked", **(options | more))

    alone = train(scratch / "one")
    on_two(lambda: train(scratch / "two"))

    refused = answers(2, lambda _: fault_of(lambda: train(scratch / "three", batch=1)), scratch)

    both = json.loads((scratch / "two" / "prunus-recovery.json").read_text())
    return {
        "alone": [x.held_out_loss for x in alone.evaluations],
        "both": [x["held_out_loss"] for x in both["evaluations"]],
        "state": both["state"],
        "refused": refused[0],
        "left": (scratch / "three").exists(),
        **compare(scratch / "one", scratch / "two"),
    }


def main() -> None:
    scratch = Path(sys.argv[1])
    found = {}
    for case in sys.argv[2:]:
        folder = scratch / case
        folder.mkdir()
        began = time.monotonic()
        found[case] = globals()[case](folder)
        print(case, round(time.monotonic() - began, 1), file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
