"""Smaller models made on a CUDA device are those that the processor makes."""

from __future__ import annotations

from typing import Any

import pytest

from devices import PRETEND, assert_same_weights
from prunus.structure.run import shrink
from tiny import tiny_checkpoint, token_ids

pytestmark = pytest.mark.cuda

#: Family and options. Trained biases of GPT-2 are added in another order there.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "blocks, experts and width": ("mixtral", {"blocks": 2, "experts": 2, "width": 0.25}),
    "cosine, joined linears": ("phi3", {"blocks": 2, "block_rule": "cosine", "width": 0.25}),
    "channels with biases": ("gpt2", {"width": 0.25, "heads": 4, "repair": False}),
    "target": ("llama", {"target": "parameters=0.8", "repair": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_device_makes_what_the_processor_makes(name, tmp_path):
    family, options = CASES[name]
    dense = tiny_checkpoint(tmp_path / "dense", family, num_hidden_layers=3)
    given = {"calibration": token_ids(4, 12), "batch": 1, "dtype": "float32", **options}
    cpu, cuda = (
        shrink(dense, tmp_path / device, device=device, **given) for device in ("cpu", "cuda:0")
    )
    if PRETEND:
        assert (cpu.search, cpu.targets) == (cuda.search, cuda.targets)
    assert [block.made_from for block in cpu.blocks] == [block.made_from for block in cuda.blocks]
    assert_same_weights(tmp_path / "cpu", tmp_path / "cuda:0")
