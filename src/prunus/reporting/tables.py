"""Tables that the verbs print. Every figure comes from a record that `--json` writes as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from prunus.compression.record import CompressionRecord
from prunus.pruning.records import mean_bits
from prunus.reporting.document import MISSING
from prunus.reporting.run_sections import error_of
from prunus.runs.record import bos_words

if TYPE_CHECKING:
    from prunus.evaluation.images import ImageScore
    from prunus.evaluation.inspection import Inspection
    from prunus.evaluation.speed import Speed
    from prunus.packed.conversion import Record
    from prunus.pruning.manifest import Manifest

__all__ = [
    "images_table",
    "inspection_table",
    "packing_table",
    "plan_table",
    "run_table",
    "speed_table",
]


def run_table(manifest: Manifest) -> Table:
    """A finished run: one row per kind of linear, and the totals."""
    error_name = "relative output error" if _has_gram(manifest) else "removed energy"
    totals, compressed = manifest.all_totals(), isinstance(manifest, CompressionRecord)
    table = Table(title=f"{manifest.what}, {manifest.source}", title_justify="left")
    sizes = ("zeros", "bits") if compressed else ("sparsity",)
    for column in ("linear", "count", "weights", *sizes, error_name, "seconds"):
        table.add_column(column, justify="left" if column == "linear" else "right")
    for name, records in manifest.linears_by_kind().items():
        weights = sum(r.shape[0] * r.shape[1] for r in records)
        zeros = sum(r.zeros for r in records)
        errors = [e for r in records if (e := error_of(r)) is not None]
        table.add_row(
            name,
            str(len(records)),
            f"{weights:,}",
            f"{zeros / weights:.2%}",
            *([_figure(mean_bits(records))] if compressed else []),
            f"{sum(errors) / len(errors):.3%}" if errors else MISSING,
            f"{sum(r.seconds for r in records):.1f}",
        )
    table.add_section()
    mean = totals["mean_relative_output_error"] or totals["mean_removed_energy"]
    table.add_row(
        "all",
        str(totals["linears"]),
        f"{totals['weights']:,}",
        f"{totals['sparsity']:.2%}",
        *([_figure(totals.get("bits"))] if compressed else []),
        f"{mean:.3%}" if mean is not None else MISSING,
        f"{totals['seconds']:.1f} in all",
    )
    peak = totals.get("peak_memory_bytes", 0) / 1e9
    table.caption = (
        f"computed in {manifest.inputs.dtype} on {manifest.inputs.device}; peak memory "
        f"{peak:.2f} GB; calibration: {manifest.inputs.calibration}, "
        f"{bos_words(manifest.inputs.bos)}"
    )
    if totals.get("forced_zeros"):
        table.caption += f"\nzeros that a mask forced: {totals['forced_zeros']:,}"
    if totals.get("expert_linears"):
        few, count = totals["expert_linears_measured_on_all"], totals["expert_linears"]
        table.caption += (
            f"\nexperts: {few} of {count} linears measured on all tokens, because too few chose "
            f"the expert (the fewest: {totals['least_routed_tokens']:,})"
        )
    table.caption_justify = "left"
    return table


def _figure(bits: float | None) -> str:
    return MISSING if bits is None else f"{bits:.3f}"


def images_table(scores: Sequence[ImageScore]) -> Table:
    """One row per image classifier, with the difference to the first."""
    table = Table(title=f"top-1 accuracy on {scores[0].images:,} images", title_justify="left")
    for column in ("model", "accuracy", "difference to the first", "seconds"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for score in scores:
        change, error = score.minus(scores[0])
        table.add_row(
            score.model,
            f"{score.accuracy:.2%} ± {score.standard_error:.2%}",
            MISSING if score is scores[0] else f"{change:+.2%} ± {error:.2%}",
            f"{score.seconds:.1f}",
        )
    table.caption = f"± one standard error; {scores[0].labels}"
    table.caption_justify = "left"
    return table


def inspection_table(inspection: Inspection) -> Table:
    """One row per linear."""
    table = Table(title=f"{inspection.model}: {inspection.blocks} blocks", title_justify="left")
    sizes = ("sparsity",) if inspection.bits is None else ("sparsity", "bits")
    for column in ("linear", "shape", "dtype", *sizes, "N:M that hold"):
        table.add_column(column, justify="right" if column in sizes else "left", overflow="fold")
    block = 0
    for linear in inspection.linears:
        if linear.block != block:
            table.add_section()
            block = linear.block
        table.add_row(
            linear.name,
            f"{linear.shape[0]} × {linear.shape[1]}",
            linear.dtype,
            f"{linear.sparsity:.2%}",
            *([] if inspection.bits is None else [_figure(linear.bits)]),
            ", ".join(linear.patterns) or MISSING,
        )
    table.add_section()
    bits = [] if inspection.bits is None else [_figure(inspection.bits)]
    all_weights, zeros = f"{inspection.weights:,} weights", f"{inspection.sparsity:.2%}"
    table.add_row("all", all_weights, "", zeros, *bits, "")
    if inspection.verified is not None:
        table.caption = f"{inspection.verified} shards have the bytes that were written"
        table.caption_justify = "left"
    return table


_BOS_OF_PLAN = {
    "auto": "if the tokenizer puts it before a text",
    "yes": "yes",
    "no": "no, as in the papers",
}


def plan_table(plan: dict[str, Any]) -> Table:
    """What a run on this machine would do.

    Args:
        plan: of `prunus.pruning.plan_summary.describe_plan`, and for preset max `training` of
            `prunus.recovery.max_preset.plan_training`.
    """
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("figure", overflow="fold")
    rows = {
        "blocks": plan["blocks"],
        "linears": plan["linears"],
        "weights": _weights_of_plan(plan),
        "sparsity": _allocation(plan["allocation"]),
        "left dense in blocks": ", ".join(plan["left_dense"]) or "nothing",
        "computation": f"{plan['dtype']} on {plan['device']} ({plan['dtype_reason']})",
        "windows per forward pass": plan["batch"],
        "BOS first in windows": _BOS_OF_PLAN[plan["bos"]],
        "hidden states": (
            f"in {plan['hidden_states']}; {plan['blocks_in_lockstep']} blocks in lockstep"
        ),
        "peak memory": f"{plan['peak_memory_bytes'] / 1e9:.2f} GB",
        "result": f"{plan['file_bytes'] / 1e9:.3f} GB",
        "disk": f"{plan['disk_bytes'] / 1e9:.2f} GB",
    }
    if (training := plan.get("training")) is not None:
        rows["training"] = (
            f"then {training['minutes']:g} minutes on {training['text']}, {training['batch']} "
            f"windows of {training['seqlen']} tokens a step; it holds the whole model, "
            f"{training['memory_bytes'] / 1e9:.2f} GB and the activations of a step"
        )
    for name, figure in rows.items():
        table.add_row(name, str(figure))
    return table


def _weights_of_plan(plan: dict[str, Any]) -> str:
    """How many weights there are, and what becomes of them."""
    weights = f"{plan['weights']:,}"
    if plan.get("bits") is None:
        return f"{weights}, of which {plan['to_remove']:,} are removed"
    sizes = f"in {plan['bits']:g} bits each"
    if plan.get("head_bits") is not None:
        sizes += f"; embeddings and head in {plan['head_bits']}"
    if plan["to_remove"]:
        return f"{weights} {sizes}; {plan['to_remove']:,} at least become 0"
    return f"{weights} {sizes}; how many become 0 follows from the rate"


def _allocation(planned: dict[str, Any]) -> str:
    """The sparsity of each block, as `prunus.pruning.plan_summary` gives it."""
    if planned["measured"]:
        return f"{planned['rule']}: measured when the run starts, and recorded in its manifest"
    return "the same everywhere"


def packing_table(record: Record) -> Table:
    """How a conversion changed the size of the linears: one row per kind of linear."""
    table = Table(title=f"{record.action} {record.source} ({record.values})", title_justify="left")
    for column in (
        "linear",
        "count",
        "packed",
        "bytes before",
        "bytes after",
        "after / before",
        "rounding error",
    ):
        table.add_column(column, justify="left" if column == "linear" else "right")
    kinds: dict[str, list[Any]] = {}
    for name, linear in record.linears.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(linear)
    for name, linears in [*kinds.items(), ("all", list(record.linears.values()))]:
        before, after = (sum(linear.nbytes[i] for linear in linears) for i in range(2))
        errors = [linear.relative_error for linear in linears if linear.relative_error is not None]
        if name == "all":
            table.add_section()
        table.add_row(
            name,
            str(len(linears)),
            str(sum(linear.packed for linear in linears)),
            f"{before:,}",
            f"{after:,}",
            f"{after / before:.3f}" if before else MISSING,
            f"{sum(errors) / len(errors):.2e}" if errors else "none",
        )
    return table


def speed_table(found: list[Speed]) -> Table:
    """Size and speed of models side by side; ratios are to the first."""
    table = Table(
        title="medians (minimum to maximum) over separate processes", title_justify="left"
    )
    columns = ("model", "file", "resident", "prefill tokens/s", "decode tokens/s", "decode / first")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for speed in found:
        table.add_row(
            speed.model,
            f"{speed.file_bytes / 1e9:.3f} GB",
            f"{speed.resident_bytes[1] / 1e9:.2f} GB",
            _with_spread(speed.prefill_tokens_per_second),
            _with_spread(speed.decode_tokens_per_second),
            f"{speed.decode_tokens_per_second[1] / found[0].decode_tokens_per_second[1]:.2f}",
        )
    return table


def _with_spread(figure: tuple[float, float, float]) -> str:
    return f"{figure[1]:.1f} ({figure[0]:.1f} to {figure[2]:.1f})"


def _has_gram(manifest: Manifest) -> bool:
    return manifest.totals.get("mean_relative_output_error") is not None
