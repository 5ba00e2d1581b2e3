"""Presets: named sets of options, chosen by measurement; docs/results/index.md has the figures."""

from __future__ import annotations

from typing import Any

#: Name -> options of a recipe. Options that the user gives explicitly override them.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "wanda"},
    "balanced": {"method": "alps", "dense_weight": 0.25, "reconstruct": "last"},
    "best": {"method": "alps", "dense_weight": 0.25, "reconstruct": "all"},
}
#: The preset of `prunus prune` that trains the whole model after pruning it by preset best.
MAX = "max"
# Only an unstructured sparsity can be distributed over layers.
_UNSTRUCTURED: dict[str, dict[str, Any]] = {"best": {"allocation": "search"}}


def preset_options(values: dict[str, Any]) -> dict[str, Any]:
    """Put `values` on top of the options of the preset that they name, if any.

    >>> preset_options({"preset": "fast", "seed": 1})
    {'method': 'wanda', 'preset': 'fast', 'seed': 1}
    >>> "allocation" in preset_options({"preset": "best", "pattern": "2:4"})
    False
    """
    name = values.get("preset")
    if name is None:
        return values
    if name == MAX:
        raise ValueError(
            "the preset 'max' is more than a recipe: it prunes with preset best and then trains. "
            "Give it as prunus prune --preset max, call prunus.prune_and_recover, or choose best"
        )
    if name not in PRESETS:
        raise ValueError(f"the preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    unstructured = values.get("pattern", "unstructured") == "unstructured"
    return PRESETS[name] | (_UNSTRUCTURED.get(name, {}) if unstructured else {}) | values
