"""From integers, steps and scales to what a packed checkpoint stores of a linear.

A program that quantises weights writes a checkpoint with these functions: `encode_levels` for each
linear, `quantized_tensors` into a shard and `quantized_entry` into its own record, and at the end
`quantized_config` for config.json.

Shape suffixes: O output features (rows), I input features (columns).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prunus.packed.description import FORMAT_VERSION, METHOD, Description, QuantizedShape
from prunus.packed.forms import named_tensors
from prunus.packed.planes import choose_codes, column_histograms, encode
from prunus.packed.weight import QuantizedWeight

__all__ = ["encode_levels", "quantized_config", "quantized_entry", "quantized_tensors"]


def encode_levels(
    levels_OI: torch.Tensor, steps_I: torch.Tensor, scales_O: torch.Tensor
) -> QuantizedWeight:
    """Write integers as bit planes in the codes that take the fewest bits.

    Args:
        levels_OI: int8 from -127 to 127, on the CPU.
        steps_I: (I,), rounded to bfloat16.
        scales_O: (O,), rounded to bfloat16.

    Raises:
        ValueError: see `planes.encode`.

    >>> weight = encode_levels(torch.eye(3, dtype=torch.int8), torch.ones(3), torch.ones(3))
    >>> sorted(quantized_tensors("up", weight))
    ['up.weight', 'up.weight_classes', 'up.weight_scales', 'up.weight_steps']
    >>> quantized_entry(weight)["codes"]
    [[0, [1]]]
    """
    classes_I, codes = choose_codes(column_histograms(levels_OI))
    return encode(levels_OI, steps_I, scales_O, classes_I, codes)


def quantized_tensors(linear: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Return the tensors of a shard that stand for the weight of a linear.

    Args:
        linear: the linear's name in the checkpoint, `model.layers.0.mlp.up_proj`.
        weight: its weight.
    """
    return named_tensors(linear, weight)


def quantized_entry(weight: QuantizedWeight) -> dict[str, Any]:
    """Return what config.json says about a linear, for `quantized_config`."""
    return QuantizedShape.of(weight).to_json()


def quantized_config(
    config: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the config.json of a checkpoint with quantised linears.

    Args:
        config: config.json of the dense checkpoint.
        entries: name of each linear in the checkpoint -> what `quantized_entry` returned.

    Raises:
        ValueError: an entry is damaged, or there are none.
    """
    content = {"quant_method": METHOD, "version": FORMAT_VERSION, "linears": entries}
    return Description.from_dict(content).add_to(config)
