"""What methods do to single linears as a section of a report, from the JSON that `benchmarks/layers.py` writes."""

from __future__ import annotations

from typing import Any

from prunus.report.document import Column, Facts, Section, Table

__all__ = ["is_layers", "layers_section"]

_NOTE = "‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖² on the calibration inputs X, and on inputs held out."


def is_layers(content: Any) -> bool:
    """Whether JSON is of this kind."""
    return isinstance(content, dict) and "layers" in content


def layers_section(content: dict[str, Any]) -> Section:
    """A table for each linear: methods by relative output error, on calibration windows and on windows held out.

    Raises:
        ValueError: it is something else.
    """
    try:
        tables = [_table(linear) for linear in content["layers"]]
        protocol = tuple((name, str(value)) for name, value in content["protocol"].items())
    except (KeyError, TypeError, AttributeError) as fault:
        raise ValueError(f"this is not the JSON of benchmarks/layers.py: {fault!r}") from None
    return Section(
        "Relative output error of single linears", parts=(*tables, Facts("Protocol", protocol))
    )


def _table(linear: dict[str, Any]) -> Table:
    patterns = list(linear["methods"][0]["errors"])
    columns = [Column("method")]
    for pattern in patterns:
        columns += [Column(pattern, ".3%"), Column(f"{pattern}, held out", ".3%")]
    rows = []
    for method in linear["methods"]:
        pairs = [method["errors"][pattern] or (None, None) for pattern in patterns]
        rows.append((method["method"], *(figure for pair in pairs for figure in pair)))
    return Table(linear["name"], tuple(columns), tuple(rows), _NOTE)
