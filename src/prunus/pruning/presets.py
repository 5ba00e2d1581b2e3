"""What we would choose ourselves: named sets of options, by measurement; see docs/pruning-better.md."""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS", "preset_options"]

#: Name -> options of a recipe; what the user gives goes before them.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "wanda"},
    "balanced": {"method": "alps", "dense_weight": 0.25, "reconstruct": "last"},
    "best": {"method": "alps", "dense_weight": 0.25, "reconstruct": "all"},
}
# Only unstructured sparsity can be shared out, and only groups of N:M care who stands next to whom.
_UNSTRUCTURED: dict[str, dict[str, Any]] = {"best": {"allocation": "search"}}
_N_OF_M: dict[str, dict[str, Any]] = {"best": {"permute": True}}


def preset_options(values: dict[str, Any]) -> dict[str, Any]:
    """`values` on top of those of the preset that they name, if any.

    Raises:
        ValueError: there is no such preset; lists those there are.
    """
    name = values.get("preset")
    if name is None:
        return values
    if name not in PRESETS:
        raise ValueError(f"the preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    unstructured = values.get("pattern", "unstructured") == "unstructured"
    return PRESETS[name] | (_UNSTRUCTURED if unstructured else _N_OF_M).get(name, {}) | values
