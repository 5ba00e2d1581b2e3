"""The table of hybrids and encoder-decoders in the documentation says what happens."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import prunus
from places import REPOSITORY
from prunus.model.kinds import kind_of
from tiny import tiny_checkpoint, token_ids

PAGE = REPOSITORY / "docs" / "reference" / "models.md"
#: Linear attention beside full attention; the tests of mixtures of experts have the latter alone.
OPTIONS = {
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
}


def rows() -> list[list[str]]:
    """The cells of the table below the heading, without its head."""
    text = PAGE.read_text(encoding="utf-8").split("## Hybrids and encoder-decoders")[1]
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> set[str]:
    """The names in a cell."""
    return {part.strip(" `") for part in cell.split(",")} - {""}


ROWS = rows()
WORKING = [(kind, dense) for _, kind, works, dense in ROWS if works == "yes"]
REFUSED = [(kind, reason) for _, kind, works, reason in ROWS if works == "no"]


def test_every_row_says_yes_or_no():
    assert len(WORKING) + len(REFUSED) == len(ROWS) >= 12
    expected = {"mamba", "falcon_h1", "granitemoehybrid", "qwen3_next", "rwkv", "t5", "whisper"}
    assert expected <= {row[0] for row in (*WORKING, *REFUSED)}


@pytest.mark.parametrize(("family", "stays_dense"), WORKING)
def test_what_works_is_pruned_and_loaded(family, stays_dense, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family, torch.bfloat16, **OPTIONS.get(family, {}))
    manifest = prunus.prune(dense, tmp_path / "out", "magnitude", calibration=token_ids(2))
    parts = {name.removesuffix(".weight").split(".")[-1] for name in manifest.left_dense}
    assert parts == names(stays_dense)
    assert 0.45 < manifest.totals["sparsity"] < 0.55
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(token_ids(1)).logits
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize(("family", "reason"), REFUSED)
def test_what_does_not_work_is_refused_by_name_with_the_reason(family, reason):
    config = AutoConfig.for_model(family)
    heads = {"rwkv": "RwkvForCausalLM"}
    config.architectures = [heads.get(family, f"{family}ForConditionalGeneration")]
    with pytest.raises(NotImplementedError) as refusal:
        kind_of(config)
    assert f"'{family}'" in str(refusal.value) and reason in str(refusal.value)
