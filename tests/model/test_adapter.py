"""Adapters of peft: merged into their base for scoring, and refused everywhere else."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunus
from prunus.model.adapter import add_lora, merge_adapter, save_adapter
from refusals import assert_refused
from tiny import token_ids
from tiny_tokenizer import dense_checkpoint

pytest.importorskip("peft")


def made_adapter(base: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = add_lora(model, ["q_proj"], rank=2, alpha=4, seed=0, base=str(base))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    folder.mkdir()
    save_adapter(adapted, folder)


def test_a_merged_adapter_computes_base_plus_update_and_has_the_files_of_the_base(tmp_path):
    base, folder = dense_checkpoint(tmp_path / "base"), tmp_path / "adapter"
    made_adapter(base, folder)
    merge_adapter(folder, base, tmp_path / "merged")
    before, merged = (prunus.load(x).model.state_dict() for x in (base, tmp_path / "merged"))
    changed = {name for name in before if not before[name].equal(merged[name])}
    assert changed == {name for name in before if name.endswith("q_proj.weight")}
    from peft import PeftModel

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    ids = token_ids()
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        found = prunus.load(tmp_path / "merged").model(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    for work in (prunus.load, prunus.inspect):
        assert_refused(FileNotFoundError, "merge it into its base model with peft", work, folder)
