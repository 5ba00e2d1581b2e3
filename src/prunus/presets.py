"""What we would choose ourselves: named sets of options, by measurement; see docs/pruning-better.md."""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS", "preset_options"]

#: Name -> options of a recipe; what the user gives goes before them.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "wanda"},
    "balanced": {"method": "alps", "targets": "dense"},
    "best": {"method": "alps", "targets": "dense", "match_blocks": True},
}


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
    return PRESETS[name] | values
