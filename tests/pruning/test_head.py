"""The output head stays dense by default. `head` prunes it on the outputs of the final norm."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunus
from reference import prune_rows
from tiny import tiny_model, token_ids, weights


@pytest.mark.parametrize(
    ("family", "head"), [("llama", "lm_head"), ("gpt_neox", "embed_out"), ("phi", "lm_head")]
)
def test_the_head_is_pruned_on_the_inputs_that_the_pruned_blocks_give_it(family, head, tmp_path):
    model = tiny_model(family, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "dense")
    ids = token_ids()
    prunus.prune(tmp_path / "dense", tmp_path / "plain", calibration=ids, batch=2)
    report = prunus.prune(
        tmp_path / "dense", tmp_path / "headed", calibration=ids, batch=2, head=True
    )
    plain, headed = weights(tmp_path / "plain"), weights(tmp_path / "headed")
    key = next(
        name for name in plain if name.endswith("lm_head.weight") or name.endswith(f"{head}.weight")
    )
    assert report.head is not None
    assert report.head.sparsity == pytest.approx(0.5)
    assert all(torch.equal(plain[name], headed[name]) for name in plain if name != key)

    # The naive way: run the pruned model, record the head's input, sort each row.
    naive = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    caught: list[torch.Tensor] = []
    naive.get_output_embeddings().register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    with torch.no_grad():
        for part in ids.split(2):
            naive(part)
    expected = plain[key].clone()
    prune_rows(expected, torch.cat([x.reshape(-1, x.shape[-1]) for x in caught]))
    assert torch.equal(headed[key], expected)

    prunus.prune(model, calibration=ids, batch=2, head=True)
    assert torch.equal(model.state_dict()[key], headed[key])


def test_a_tied_head_is_refused_before_any_work(tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    with pytest.raises(NotImplementedError, match="tied to the input embedding"):
        prunus.prune(tmp_path / "dense", tmp_path / "out", calibration=token_ids(), head=True)
    assert not (tmp_path / "out").exists()
