"""The table of a finished recovery. Every figure stands in its record as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from prunus.runs.record import bos_words

if TYPE_CHECKING:
    from prunus.recovery import RecoveryRecord

__all__ = ["recovery_table"]


def recovery_table(record: RecoveryRecord) -> Table:
    """Return the evaluations of the held-out windows as a table, with totals below it."""
    table = Table(title=f"{record.options.mode}, {record.source}", title_justify="left")
    for column in ("step", "tokens", "training loss", "held-out perplexity", "seconds", ""):
        table.add_column(column, justify="right")
    for number, entry in enumerate(record.evaluations):
        table.add_row(
            str(entry.step),
            f"{entry.tokens:,}",
            f"{entry.training_loss:.4f}" if entry.training_loss is not None else "–",
            f"{entry.perplexity:.3f}",
            f"{entry.seconds:.0f}",
            "the result" if number == record.best else "",
        )
    table.caption, table.caption_justify = "\n".join(_totals(record)), "left"
    return table


def _totals(record: RecoveryRecord) -> list[str]:
    totals, lines = record.totals, []
    if record.linears:
        lines.append(
            f"zeros kept: {totals['zeros']:,} of {totals['weights']:,} weights "
            f"({totals['sparsity']:.2%}) in {len(record.linears)} pruned linears, "
            "compared weight by weight"
        )
    if totals.get("added_parameters"):
        lines.append(
            f"parameters added: {totals['added_parameters']:,} ({totals['added_share']:.3%})"
        )
    target = record.teacher if record.teacher is not None else "the text alone"
    lines.append(
        f"text: {record.inputs.text}; {bos_words(record.inputs.bos)}; learning from {target}; "
        f"computed in {record.inputs.dtype} on {record.inputs.device}"
    )
    lines.append(
        f"{totals['seconds']:.0f} s; peak memory {totals['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    if record.stopped is not None:
        lines.append(f"stopped early: {record.stopped}")
    if record.best == 0:
        lines.append(
            "no evaluation was better than the start, so the result is the start; try a smaller "
            "--learning-rate"
        )
    return lines
