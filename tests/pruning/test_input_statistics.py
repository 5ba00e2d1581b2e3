"""`prunus.statistics`: sums over the inputs of every linear, in memory and in a file."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import prunus
from prunus.methods import METHODS, Pattern
from refusals import assert_refused
from tiny import tiny_checkpoint, token_ids, weights

Q, K = (f"model.layers.0.self_attn.{x}_proj" for x in "qk")


def same(one, other) -> bool:
    parts = [(x.tokens, x.in_features, x.spec.needs, x.gram_II is None) for x in (one, other)]
    grams = one.gram_II is None or torch.equal(one.gram_II, other.gram_II)
    return parts[0] == parts[1] and torch.equal(one.sum_squares_I, other.sum_squares_I) and grams


@pytest.mark.parametrize("needs", ["norms", "gram"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_file_holds_the_statistics_that_are_returned(family, needs, tmp_path):
    dense, file = tiny_checkpoint(tmp_path / "dense", family), tmp_path / "x.safetensors"
    found = prunus.statistics(dense, token_ids(), needs)
    assert [*found] == [linear.name for linear in prunus.inspect(dense).linears]
    assert found[Q] is found[K] and found[Q].tokens == 96
    for stored in (prunus.statistics(dense, token_ids(), needs, file), prunus.statistics(file)):
        assert [*stored] == [*found] and all(same(stored[name], found[name]) for name in found)
    assert {*tmp_path.iterdir()} == {dense, file}
    # Linears with the same input share their sums.
    assert f"{Q}/sum_squares" in load_file(file) and f"{K}/sum_squares" not in load_file(file)
    loaded = prunus.statistics(AutoModelForCausalLM.from_pretrained(dense), token_ids(), needs)
    assert all(same(loaded[name], found[name]) for name in found)


def test_methods_prune_by_them(dense, tmp_path):
    found = prunus.statistics(dense, token_ids(), only=["*self_attn.q_proj"])
    assert [*found] == [Q, Q.replace("0", "1")]
    prunus.prune(dense, tmp_path / "out", sparsity=0.5, calibration=token_ids())
    weight_OI = weights(dense)[f"{Q}.weight"]
    pruned = METHODS["wanda"].prune(weight_OI, found[Q], Pattern(), 0.5)
    assert torch.equal(pruned.weight_OI, weights(tmp_path / "out")[f"{Q}.weight"])


def test_bad_input_is_refused_before_any_work(dense, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    for words, arguments, options in (
        ("norms or gram, not 'grams'", (dense, token_ids(), "grams"), {}),
        ("must end in .safetensors", (dense, token_ids(), "norms", tmp_path / "x.pt"), {}),
        ("unknown option 'sparsity'", (dense, token_ids()), {"sparsity": 0.5}),
        ("matches none", (dense, token_ids()), {"only": ["*.nothing"]}),
        ("holds no statistics", (other,), {}),
    ):
        assert_refused(ValueError, words, prunus.statistics, *arguments, **options)
    prunus.statistics(dense, token_ids(), "norms", file := tmp_path / "x.safetensors")
    file.write_bytes(file.read_bytes().replace(b"q_proj/sum", b"q_proj/som", 1))
    assert_refused(ValueError, "damaged", prunus.statistics, file)
