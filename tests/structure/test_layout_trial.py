"""Which rows of a joined linear belong to which channel or head, found by running a block."""

from __future__ import annotations

import pytest
import torch

from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.structure.layout_trial import LayoutTrial
from prunus.structure.spans import Cut, Span
from tiny import tiny_checkpoint

CHANNELS, HEADS, GROUPS = Span("channels", 64, 1), Span("heads", 4, 8), Span("groups", 2, 8)


@pytest.mark.parametrize(
    ("family", "reader", "read", "name", "right", "wrong"),
    [
        (
            "phi3",
            "mlp.down_proj",
            CHANNELS,
            "mlp.gate_up_proj.weight",
            Cut(0, (CHANNELS, CHANNELS)),
            [Cut(0, (Span("channels", 64, 2),))],
        ),
        (
            "phi3",
            "self_attn.o_proj",
            HEADS,
            "self_attn.qkv_proj.weight",
            Cut(0, (HEADS, GROUPS, GROUPS)),
            [Cut(0, (GROUPS, GROUPS, HEADS)), Cut(0, (Span("heads", 4, 16),))],
        ),
        (
            "gpt2",
            "attn.c_proj",
            HEADS,
            "attn.c_attn.weight",
            Cut(1, (HEADS, HEADS, HEADS)),
            [Cut(1, (Span("heads", 4, 24),))],
        ),
        (
            "gpt_neox",
            "attention.dense",
            HEADS,
            "attention.query_key_value.bias",
            Cut(0, (Span("heads", 4, 24),)),
            [Cut(0, (HEADS, HEADS, HEADS))],
        ),
    ],
)
def test_a_wrong_layout_is_passed_over(family, reader, read, name, right, wrong, tmp_path):
    source = CheckpointSource(tiny_checkpoint(tmp_path / "dense", family))
    skeleton = Skeleton(source.config, torch.float32)
    source.bind(skeleton)
    trial = LayoutTrial(skeleton, source, torch.device("cpu"))
    columns = Cut(1, (read,))
    assert trial.choose(1, reader, columns, name, [*wrong, right]) == right
    assert trial.choose(1, reader, columns, name, wrong) is None
