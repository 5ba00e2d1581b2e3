"""A run that makes a model smaller: interruption, recipes, and requests that cannot be met."""

from typing import Any

import pytest

import prunus
from command_line import call
from devices import PRETEND, assert_same_weights
from prunus.model.checkpoint.files import verify_shards
from prunus.structure.structure_record import StructureRecipe, StructureRecord
from structure_cases import bytes_of, loaded, shrunk_with_a_kill
from structure_cases import shrink_without_repair as shrink
from tiny import ids_file, tiny_checkpoint, token_ids

#: Family, number of finished blocks before the kill, and options.
KILLS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "experts": ("gpt_oss", 1, {"experts": 3, "batch": 2}),
    "blocks": ("llama", 1, {"blocks": 2, "batch": 2}),
    "repair of blocks": ("llama", 2, {"blocks": 3, "repair": True}),
    "repair of experts": ("mixtral", 2, {"experts": 3, "repair": True}),
}


@pytest.mark.parametrize("case", KILLS)
def test_a_killed_run_continues_to_the_same_bytes(case, tmp_path):
    family, after, options = KILLS[case]
    sizes = {"num_hidden_layers": 4} if family != "gpt_oss" else {}
    dense = tiny_checkpoint(tmp_path / "dense", family, **sizes)
    options = {"calibration": token_ids(8), **options}
    shrink(dense, tmp_path / "whole", **options)
    shrunk_with_a_kill(dense, tmp_path / "killed", after, **options)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "killed")
    verify_shards(tmp_path / "killed")
    before = (tmp_path / "killed" / StructureRecord.FILE).read_bytes()
    shrink(dense, tmp_path / "killed", **options)
    assert (tmp_path / "killed" / StructureRecord.FILE).read_bytes() == before


def test_a_smaller_model_is_made_smaller_and_pruned_like_any_other(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "mixtral")
    run = {"calibration": token_ids(), "batch": 2}
    shrink(dense, tmp_path / "three", experts=3, **run)
    shrink(tmp_path / "three", tmp_path / "two", experts=2, **run)
    assert verify_shards(tmp_path / "two") == 3
    manifest = prunus.prune(tmp_path / "two", tmp_path / "pruned", sparsity=0.5, **run)
    assert manifest.totals["expert_linears"] == 2 * 2 * 3
    loaded(tmp_path / "pruned")


#: Family, options, and a pattern of the error.
REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "nothing is to be removed"),
    ("llama", {"blocks": 1, "sampels": 3}, "unknown option 'sampels'"),
    ("llama", {"blocks": 0.9999}, "of the 4 blocks of .*: possible numbers to keep are 1"),
    ("llama", {"blocks": 4}, "of the 4 blocks of .*: possible numbers to keep are 1 to 3"),
    ("llama", {"experts": 0.5}, "not a mixture of experts"),
    ("mixtral", {"experts": 1}, "a token chooses 2 of them: possible .* keep are 2, 3"),
    ("mixtral", {"experts": 4}, "possible numbers to keep are 2, 3"),
    ("mixtral", {"experts": 0.9}, "0.9 would keep 0 of the 4 experts"),
    ("mixtral", {"experts": 1.5}, r"a share to remove in \(0, 1\), such as 0.25, or a num"),
    ("grouped", {"experts": 5}, "2 groups of one size, of which a token uses 1"),
    ("grouped", {"experts": 5}, "possible numbers to keep are 4, 6"),
    ("llama", {"blocks": 3, "batch": 6, "repair": True}, "6 make one batch .* give more, or a sma"),
]


@pytest.mark.parametrize("family", dict.fromkeys(family for family, *_ in REFUSALS))
def test_what_cannot_be_ends_before_any_work_and_says_what_can(family, tmp_path):
    sizes: dict[str, Any] = {"grouped": {"n_group": 2, "topk_group": 1}, "mixtral": {}}.get(
        family, {"num_hidden_layers": 4, "initializer_range": 0.2}
    )
    known = "deepseek_v3" if family == "grouped" else family
    dense = tiny_checkpoint(tmp_path / "dense", known, **sizes)
    for name, options, said in REFUSALS:
        if name == family:
            with pytest.raises(ValueError, match=said):
                shrink(dense, tmp_path / "small", calibration=token_ids(), **options)
            assert not (tmp_path / "small").exists()


def test_a_recipe_is_read_from_what_it_writes(tmp_path):
    recipe = StructureRecipe(
        experts=6, blocks=0.25, saliency="contribution", calibration='a "b".txt'
    )
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert StructureRecipe.read(path, {"seed": None}) == recipe
    assert StructureRecipe.read(recipe, {"experts": "0.5"}).experts == 0.5
    assert StructureRecipe.read(path, {"experts": "5"}).experts == 5


def test_the_verb_prints_what_changed(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "mixtral")
    ids = ids_file(tmp_path / "ids.safetensors")
    common = ("--calibration", ids, "--samples", 6, "--seqlen", 16)
    result = call("shrink", dense, tmp_path / "small", "--experts", 0.25, *common)
    assert "num_local_experts" in result.output
    assert "3 of 4 experts stay in each of 2 layers" in result.output


#: Family -> options.
DEVICES: dict[str, dict[str, Any]] = {
    "mixtral": {"blocks": 2, "experts": 2},
    "phi3": {"blocks": 2},
}


@pytest.mark.cuda
@pytest.mark.parametrize("family", DEVICES)
def test_a_cuda_device_makes_what_the_processor_makes(family, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family, num_hidden_layers=3)
    given = {"calibration": token_ids(4, 12), "batch": 1, "dtype": "float32", "repair": True}
    cpu, cuda = (
        shrink(dense, tmp_path / device, device=device, **(given | DEVICES[family]))
        for device in ("cpu", "cuda:0")
    )
    if PRETEND:
        assert cpu.search == cuda.search
    assert [block.made_from for block in cpu.blocks] == [block.made_from for block in cuda.blocks]
    assert_same_weights(tmp_path / "cpu", tmp_path / "cuda:0")
