"""What an imported GGUF file keeps: how text is split, and where the model comes from."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import gguf

import prunus
from gguf_cases import gguf_checkpoint, known_layout
from prunus.formats.gguf.import_checkpoint import import_gguf
from tiny import token_ids
from tiny_gguf import tiny_llama, write_gguf
from tiny_tokenizer import BOS

TEXT = "1. I'LL\n 10.  x2 =  345;\t(été)"
#: How llama.cpp splits the text with each kind of tokenizer.
PIECES = {
    "smollm": "1|.| I|'|LL|\n |1|0|.| | x|2| =|  |3|4|5|;|\t|(|été|)",
    "gpt-2": "1|.| I|'|LL|\n| 10|.| | x|2| =| | 345|;|\t|(|été|)",
    "qwen2": "1|.| I|'LL|\n| |1|0|.| | x|2| =| | |3|4|5|;|\t|(été|)",
    "llama-bpe": "1|.| I|'LL|\n| |10|.| | x|2| =| | |345|;|\t|(été|)",
    "gpt-4o": "1|.| I'LL|\n| |10|.| | x|2| =| | |345|;|\t|(été|)",
    "deepseek-coder": "1|.| I|'|LL|\n| |1|0|.| | x|2| =  |3|4|5|;|\t(|été|)",
    "default": "1|.| I|'|LL|\n| |10|.| | x|2| |=| | |345|;|\t|(|été|)",
}
#: Names that mean the same splitting as one of these.
SAME = {"refact": "smollm", "olmo": "gpt-2", "glm4": "llama-bpe", "llama4": "gpt-4o"}
FACTS: dict[str, Any] = {
    "name": "Tiny Instruct",
    "author": "A. Person",
    "organization": "Some: lab #1",
    "version": "1.0",
    "basename": "tiny",
    "finetune": "instruct",
    "size_label": "1M",
    "license": "other",
    "license.name": "no-limits",
    "license.link": "https://example.com/a b",
    "languages": ["no", "en"],
    "tags": ["text-generation", "a, b"],
    "base_model.count": 1,
    "base_model.0.name": "Tiny",
    "base_model.0.organization": "Owner",
    "base_model.0.repo_url": "https://huggingface.co/owner/tiny",
}


def imported(folder: Path, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_gguf(tiny_llama(), folder / "tiny.gguf", **options)
    import_gguf(folder / "tiny.gguf", folder / "out", overwrite=True)
    return folder / "out"


def fields_to_write(folder: Path) -> dict[str, Any]:
    """The fields of the GGUF file that is made of a checkpoint."""
    return {key: each.value for key, each in known_layout(folder)[0].fields.items()}


def card_of(folder: Path) -> dict[str, Any]:
    return ModelCard.load(folder / "README.md").data.to_dict()


# --- how text is split ---


@pytest.mark.parametrize("pre", [*PIECES, *SAME])
def test_an_imported_tokenizer_splits_text_as_its_file_says(pre, tmp_path):
    out = imported(tmp_path, pre=pre)
    tokenizer = AutoTokenizer.from_pretrained(out).backend_tokenizer
    spans = [span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]
    expected = PIECES[SAME.get(pre, pre)]
    assert "|".join(TEXT[begin:end] for begin, end in spans) == expected
    assert fields_to_write(out)["tokenizer.ggml.pre"] == pre


def test_a_result_of_an_imported_model_keeps_the_name_of_the_splitting(tmp_path):
    out = imported(tmp_path, pre="starcoder")
    prunus.prune(out, tmp_path / "pruned", "magnitude", 0.5, calibration=token_ids(2))
    assert fields_to_write(tmp_path / "pruned")["tokenizer.ggml.pre"] == "starcoder"


def test_an_unknown_splitting_is_a_warning_and_keeps_its_name(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"'kimi-k2'.* may give other token ids. Copy"):
        out = imported(tmp_path, pre="kimi-k2")
    assert fields_to_write(out)["tokenizer.ggml.pre"] == "kimi-k2"


@pytest.mark.parametrize(("pre", "begins"), [("llama-bpe", True), ("smollm", False)])
def test_texts_begin_with_bos_where_llama_cpp_adds_it(pre, begins, tmp_path):
    ids = AutoTokenizer.from_pretrained(imported(tmp_path, pre=pre))("ab")["input_ids"]
    assert (ids[0] == BOS) == begins and len(ids) == 1 + begins


# --- where the model comes from ---


def test_licence_author_languages_and_base_model_survive_an_import(tmp_path):
    out = imported(tmp_path, facts=FACTS)
    card, kept = card_of(out), {key: FACTS[key] for key in ("organization", "version", "tags")}
    licence = {"license": "other", "license_name": "no-limits", "language": ["no", "en"]}
    assert card == card | kept | licence | {"base_model": ["owner/tiny"]}
    written = fields_to_write(out)
    assert {f"general.{key}": written.get(f"general.{key}") for key in FACTS} == {
        f"general.{key}": value for key, value in FACTS.items()
    }


def test_an_import_says_which_types_the_weights_had(tmp_path):
    out = imported(tmp_path, quantize="Q4_1")
    types = card_of(out)["prunus"]["gguf_types"]
    assert [*types] == ["Q4_1", "F32"] and sum(types.values()) == pytest.approx(1)
    assert f"{types['Q4_1']:.1%} Q4_1" in (out / "README.md").read_text()
    summary = import_gguf(tmp_path / "tiny.gguf", tmp_path / "out", overwrite=True)
    assert summary["types"] == types


def test_a_result_has_what_the_card_of_an_import_says(tmp_path):
    out = imported(tmp_path, facts=FACTS)
    prunus.prune(out, tmp_path / "pruned", "magnitude", 0.5, calibration=token_ids(2))
    card = card_of(tmp_path / "pruned")
    for field in ("license", "license_name", "language", "organization", "author", "base_model"):
        assert card[field] == card_of(out)[field], field
    # The import is no model of the hub, and how it is related to its base is not known.
    assert "base_model_relation" not in card and "name" not in card
    assert fields_to_write(tmp_path / "pruned")["general.license"] == "other"


def test_a_base_model_that_is_not_on_the_hub_is_left_out(tmp_path):
    other = {"base_model.count": 1, "base_model.0.repo_url": "https://example.com/owner/name"}
    out = imported(tmp_path, facts=other)
    assert "base_model" not in card_of(out)
    assert "general.base_model.count" not in fields_to_write(out)


def test_nothing_is_made_up_where_a_file_says_nothing(tmp_path):
    out = imported(tmp_path)
    assert card_of(out).keys() == {"name", "prunus"}
    general = {key for key in fields_to_write(out) if key.startswith("general.")}
    named = {"general.architecture", "general.type", "general.name", "general.size_label"}
    assert general == named | {"general.quantization_version"}


def test_a_model_in_the_hubs_cache_has_its_own_name_in_a_file(tmp_path):
    folder = tmp_path / "models--owner--Tiny-Instruct-1M" / "snapshots" / "0a1b2c"
    folder.parent.mkdir(parents=True)
    written = fields_to_write(gguf_checkpoint(folder))
    assert written["general.name"] == "Tiny Instruct 1M"
    assert written["general.organization"] == "Owner"


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [mit\n---\n",
        "---\nlicense: mit\nlanguage: no\nversion: 2024-01-01\nname: [a, b]\ntags: 3\n---\n",
        "---\nbase_model:\n- owner/name\n- {name: [1]}\nlicense: {a: b}\n---\n",
        "no fields",
        "---\n" + "a: [" * 5000 + "\n---\n",
    ],
)
def test_no_card_of_a_stranger_makes_a_file_fail(card, tmp_path):
    folder = gguf_checkpoint(tmp_path / "tiny-1B")
    (folder / "README.md").write_text(card)
    written = fields_to_write(folder)
    assert written["general.name"] == "Tiny 1B"
    if "language: no" in card:
        texts = {"languages": ["no"], "version": "2024-01-01", "tags": ["3"], "license": "mit"}
        assert written == written | {f"general.{key}": value for key, value in texts.items()}


@pytest.mark.skipif(
    not hasattr(gguf.Metadata, "load_generation_config"),
    reason="this package gguf has no such fields",
)
def test_sampling_options_of_a_model_are_in_its_file(tmp_path):
    folder = gguf_checkpoint(tmp_path / "dense")
    path = folder / "generation_config.json"
    options = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**options, "temperature": 0.5, "top_k": 7}))
    written = fields_to_write(folder)
    assert (written["general.sampling.temp"], written["general.sampling.top_k"]) == (0.5, 7)
