"""The histograms of one linear as a section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prunus.reporting.document import Column, Histogram, Section, Table

if TYPE_CHECKING:
    from prunus.evaluation.histograms import LinearHistograms

__all__ = ["histogram_section"]


def histogram_section(found: LinearHistograms) -> Section:
    """The section of one linear's histograms, each with a table of the same counts.

    The histograms show the weights before and after pruning, and the scores of kept and of removed
    weights. What the run does not record, such as the dense weights, is left out.
    """
    notes = list(found.notes)
    if found.outside:
        notes.insert(0, f"{found.outside:,} weights lie outside the plots.")
    parts: list[Any] = []
    edges, after = found.weight_edges, (("kept", found.after),)
    if found.before is not None and found.removed is not None:
        kept = tuple(all_ - gone for all_, gone in zip(found.before, found.removed, strict=True))
        dense = (("kept", kept), ("removed", found.removed))
        highest = max((*found.before, *found.after))
        parts.append(
            Histogram("Dense weights, kept and removed", "weight", edges, dense, highest=highest)
        )
        parts.append(Histogram("Weights after pruning", "weight", edges, after, highest=highest))
        counts = [
            ("dense", found.before),
            ("removed", found.removed),
            ("after pruning", found.after),
        ]
        parts.append(_counts_table("Weights, counts", edges, counts))
    else:
        parts.append(Histogram("Weights after pruning", "weight", edges, after))
        parts.append(_counts_table("Weights, counts", edges, [("after pruning", found.after)]))
    if found.score:
        series = (("kept", found.score_kept), ("removed", found.score_removed))
        # The source of the inputs may be a long name; it goes below the chart, not on its axis.
        name, _, source = found.score.partition(", ")
        note = f"Scores: {source}." if source else ""
        parts.append(
            Histogram(
                "Scores of kept and removed weights",
                name,
                found.score_edges,
                series,
                note,
                log_x=True,
            )
        )
        powers = tuple(10**edge for edge in found.score_edges)
        parts.append(_counts_table("Scores, counts", powers, list(series)))
    return Section(f"Histograms of {found.linear}", " ".join(notes), tuple(parts))


def _counts_table(
    title: str, edges: tuple[float, ...], series: list[tuple[str, tuple[int, ...]]]
) -> Table:
    columns = (
        Column("from", ".4g"),
        Column("to", ".4g"),
        *(Column(name, ",d") for name, _ in series),
    )
    rows = zip(edges[:-1], edges[1:], *(counts for _, counts in series), strict=True)
    return Table(title, columns, tuple(rows), folded=True)
