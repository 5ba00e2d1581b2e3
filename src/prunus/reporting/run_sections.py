"""A pruning run as a section: headline, heat maps over blocks and linears, recipe and machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.compression.record import CompressionRecord
from prunus.pruning.records import mean_bits
from prunus.reporting.document import Column, Facts, HeatMap, Section, Table
from prunus.runs.record import bos_words

if TYPE_CHECKING:
    from prunus.pruning.manifest import Manifest
    from prunus.pruning.records import LinearRecord
    from prunus.runs.record import WindowInputs

__all__ = ["error_of", "input_facts", "items_of", "run_section"]

#: Name of an error -> its definition.
_DEFINITIONS = {
    "relative output error": (
        "Relative output error: ‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖² on the calibration inputs X."
    ),
    "removed energy": (
        "Removed energy: Σ(w−ŵ)²‖x‖² / Σw²‖x‖², the output error if inputs were uncorrelated."
    ),
}


def run_section(manifest: Manifest) -> Section:
    """The section of a run.

    Args:
        manifest: of a run that is finished or not.
    """
    parts: list[Any] = [
        _headline(manifest),
        _by_kind(manifest),
        *_heat_maps(manifest),
        _by_linear(manifest),
    ]
    recipe = {
        key: value for key, value in manifest.recipe.model_dump().items() if value not in (None, ())
    }
    parts += [
        Facts("Recipe", items_of(recipe)),
        input_facts(manifest.inputs),
        Facts("Machine", items_of(manifest.hardware | manifest.versions)),
    ]
    name = Path(manifest.source).name or manifest.source
    if isinstance(manifest, CompressionRecord):
        title = f"{name}: {manifest.recipe.bits:g} bits per weight"
        return Section(title, parts=tuple(parts))
    shape = (
        manifest.recipe.pattern
        if manifest.recipe.n_of_m
        else f"{manifest.recipe.sparsity:.0%} unstructured"
    )
    return Section(f"{name}: {manifest.recipe.method}, {shape}", parts=tuple(parts))


def items_of(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Pairs of names and values as text."""
    return tuple(
        (key, ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value))
        for key, value in values.items()
    )


def input_facts(inputs: WindowInputs) -> Facts:
    """What the result of a run depends on beside its recipe."""
    return Facts(
        "Inputs",
        items_of(
            {
                "calibration text": inputs.calibration,
                "windows begin": bos_words(inputs.bos),
                "calibration sha256": inputs.calibration_sha256,
                "checkpoint fingerprint": inputs.checkpoint,
                "computed in": f"{inputs.dtype} ({inputs.dtype_reason})",
                "windows per forward pass": inputs.batch,
            }
        ),
    )


def _headline(manifest: Manifest) -> Facts:
    totals = manifest.all_totals()
    name, error = _error_of_totals(totals)
    items = [
        *_sizes(manifest, totals),
        (name, f"{error:.3%}" if error is not None else "not measured"),
        ("time", f"{totals['seconds']:.1f} s"),
    ]
    if "peak_memory_bytes" in totals:
        items.append(("peak memory", f"{totals['peak_memory_bytes'] / 1e9:.2f} GB"))
    if manifest.state != "finished":
        items.insert(0, ("state", f"unfinished: {len(manifest.blocks)} blocks are done"))
    return Facts("Headline", tuple(items), headline=True)


def _sizes(manifest: Manifest, totals: dict[str, Any]) -> list[tuple[str, str]]:
    """How sparse the result is, and how small."""
    counts = f"{totals['zeros']:,} of {totals['weights']:,}"
    if not isinstance(manifest, CompressionRecord):
        return [("sparsity reached", f"{totals['sparsity']:.2%}"), ("weights removed", counts)]
    asked, reached, forced = manifest.recipe.bits, totals.get("bits"), totals.get("forced_zeros", 0)
    bits = "not known yet" if reached is None else f"{reached:.3f}"
    return [
        ("bits per weight", f"{bits} (asked for: {asked:g})"),
        ("zeros", f"{totals['sparsity']:.2%}: {counts}"),
        ("zeros by a mask", f"{forced:,}"),
        ("zeros by the rate", f"{totals['zeros'] - forced:,}"),
    ]


def _error_of_totals(totals: dict[str, Any]) -> tuple[str, float | None]:
    if totals["mean_relative_output_error"] is not None:
        return "mean relative output error", totals["mean_relative_output_error"]
    return "mean removed energy", totals["mean_removed_energy"]


def error_of(record: LinearRecord) -> float | None:
    """The relative output error of a pruned linear, or its removed energy; None if not measured."""
    return (
        record.relative_output_error
        if record.relative_output_error is not None
        else record.removed_energy
    )


def _kinds(manifest: Manifest) -> list[str]:
    """Names of linears within their block, in the order in which they first occur."""
    return list(dict.fromkeys(name for block in manifest.blocks for name in block.linears))


def _by_kind(manifest: Manifest) -> Table:
    compressed = isinstance(manifest, CompressionRecord)
    rows: list[tuple[Any, ...]] = []
    groups = {
        kind: [b.linears[kind] for b in manifest.blocks if kind in b.linears]
        for kind in _kinds(manifest)
    }
    if manifest.head is not None:
        groups["output head"] = [manifest.head]
    for kind, records in groups.items():
        weights = sum(r.shape[0] * r.shape[1] for r in records)
        zeros = sum(r.zeros for r in records)
        errors = [e for r in records if (e := error_of(r)) is not None]
        mean = sum(errors) / len(errors) if errors else None
        bits = (mean_bits(records),) if compressed else ()
        seconds = sum(r.seconds for r in records)
        rows.append((kind, len(records), weights, zeros / weights, *bits, mean, seconds))
    error_name = _error_of_totals(manifest.summary())[0]
    columns = (
        Column("linear"),
        Column("count", ",d"),
        Column("weights", ",d"),
        Column("sparsity", ".2%"),
        *((Column("bits", ".3f"),) if compressed else ()),
        Column(error_name, ".3%"),
        Column("seconds", ".2f"),
    )
    return Table(
        "By kind of linear", columns, tuple(rows), _DEFINITIONS[error_name.removeprefix("mean ")]
    )


def _heat_maps(manifest: Manifest) -> list[HeatMap]:
    kinds = _kinds(manifest)
    blocks = tuple(str(index) for index in range(len(manifest.blocks)))

    def grid(figure: Any) -> tuple[tuple[float | None, ...], ...]:
        return tuple(
            tuple(
                figure(block.linears[kind]) if kind in block.linears else None
                for block in manifest.blocks
            )
            for kind in kinds
        )

    error_name, mean = _error_of_totals(manifest.summary())
    maps: list[tuple[str, Any, str]] = [
        ("Sparsity per block and linear", lambda r: r.sparsity, ".2%")
    ]
    if isinstance(manifest, CompressionRecord):
        maps.append(("Bits per weight per block and linear", lambda r: r.bits, ".3f"))
    if mean is not None:
        title = f"{error_name.removeprefix('mean ').capitalize()} per block and linear"
        maps.append((title, error_of, ".3%"))
    maps.append(("Seconds per block and linear", lambda r: r.seconds, ".3f"))
    return [
        HeatMap(title, "block", blocks, tuple(kinds), grid(figure), form)
        for title, figure, form in maps
    ]


def _by_linear(manifest: Manifest) -> Table:
    compressed = isinstance(manifest, CompressionRecord)
    rows: list[tuple[Any, ...]] = []
    for index, block in enumerate(manifest.blocks):
        for name, r in block.linears.items():
            notes = "; ".join(f"{key}: {value}" for key, value in r.notes.items())
            shape = f"{r.shape[0]} × {r.shape[1]}"
            rows.append(
                (
                    index,
                    f"{block.name}.{name}",
                    shape,
                    r.zeros,
                    r.sparsity,
                    *((r.bits,) if compressed else ()),
                    error_of(r),
                    r.seconds,
                    notes or None,
                )
            )
    columns = (
        Column("block", "d"),
        Column("linear"),
        Column("out × in"),
        Column("zeros", ",d"),
        Column("sparsity", ".2%"),
        *((Column("bits", ".3f"),) if compressed else ()),
        Column(_error_of_totals(manifest.summary())[0].removeprefix("mean "), ".3%"),
        Column("seconds", ".3f"),
        Column("notes"),
    )
    return Table(f"All {len(rows)} linears", columns, tuple(rows), folded=True)
