"""What llama.cpp and mlx-lm compute whatever a configuration says: every entry of the tables."""

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoConfig

pytest.importorskip("gguf")

from changes import edit_json
from gguf_cases import FAMILIES as GGUF_FAMILIES
from gguf_cases import compress, gguf_checkpoint, known_layout, known_tensors, write_container
from prunus.formats.fixed import LLAMA_CPP, MLX, Table, check_fixed, check_known
from prunus.formats.mlx import FAMILIES as MLX_FAMILIES
from refusals import assert_refused
from tiny import COMMON, FAMILIES

#: Family of transformers -> its entry in a table. The tables have one for each family that can be
#: written ...
GGUF = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "olmoe": "olmoe", "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3",
    "phi": "phi2", "phi3": "phi3",
}  # fmt: skip
#: ... and that of llama.cpp has those of which a template can be checked.
TEMPLATES = {
    family: family
    for family in (
        "apertus", "arcee", "bloom", "exaone4", "gemma", "gemma2", "granite", "granitemoe", "lfm2",
        "mamba", "mamba2", "olmo", "seed_oss", "smollm3", "stablelm", "starcoder2",
    )
} | {
    "cohere": "command-r", "deepseek_v2": "deepseek2", "falcon_h1": "falcon-h1",
    "gpt_oss": "gpt-oss", "hunyuan_v1_dense": "hunyuan-dense", "olmo3": "olmo2",
    "qwen3_5_text": "qwen35",
}  # fmt: skip
#: What a hostile configuration may say. The first that a program does not compute is tried.
OTHERS = ["relu", True, False, 3, 0.5, [1]]


def described(family: str, **options: Any) -> Any:
    """The configuration of a tiny model that both programs compute."""
    own = COMMON | FAMILIES.get(family, {}) | GGUF_FAMILIES.get(family, {})
    if family.startswith("gemma"):
        own |= {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
    elif family != "olmo3":
        own |= {"sliding_window": None}
    if family == "gemma3_text":
        own |= {"layer_types": ["sliding_attention"] * 2}
    if family in ("qwen2_moe", "llama"):
        own |= {"head_dim": 8}
    return AutoConfig.for_model(family, **own | options)


def entries(table: Table, families: dict[str, str]) -> Iterator[Any]:
    for family, entry in families.items():
        for option in table[entry]:
            yield pytest.param(table, family, entry, option, id=f"{family}-{option}")


@pytest.mark.parametrize(
    ("table", "family", "entry", "option"),
    [*entries(LLAMA_CPP, GGUF | TEMPLATES), *entries(MLX, {family: family for family in MLX})],
)
def test_another_value_of_any_option_is_refused_by_name(table, family, entry, option):
    config = described(family)
    check_fixed("it", "a file", config, table[entry])
    if option == "sliding_window" and hasattr(config, "layer_types"):
        config.layer_types = ["sliding_attention", "full_attention"]
    computed = table[entry][option]
    allowed = computed(config.to_dict()) if callable(computed) else computed
    value = next(x for x in OTHERS if x not in allowed)
    *outer, name = option.split(".")
    rope = config.rope_parameters if hasattr(config, "rope_parameters") else None
    if name.startswith("rope_") or name == "partial_rotary_factor":
        config.rope_parameters = rope = dict(rope or {})
        for part in outer or [x for x in rope if x == "full_attention"]:
            rope[part] = rope = dict(rope[part])
        rope[name] = value
    else:
        vars(config)[name] = value
    with pytest.raises(NotImplementedError) as refusal:
        check_fixed("it", "a file", config, table[entry])
    assert f"with {option} = " in str(refusal.value)
    assert f"this model has {value}: it cannot be written as a file" in str(refusal.value)


def test_every_family_that_is_written_has_an_entry():
    assert MLX.keys() == MLX_FAMILIES.keys()
    assert {*GGUF.values(), *TEMPLATES.values()} == LLAMA_CPP.keys()


@pytest.mark.parametrize("family", GGUF)
def test_an_option_that_nothing_is_known_of_must_be_as_usual(family, monkeypatch):
    config = described(family)
    check_known(config, LLAMA_CPP[GGUF[family]])
    monkeypatch.setattr(type(config), "new_scale", 1.0, raising=False)
    to_dict = type(config).to_dict
    monkeypatch.setattr(
        type(config), "to_dict", lambda self: to_dict(self) | {"new_scale": self.new_scale}
    )
    check_known(config, LLAMA_CPP[GGUF[family]])
    config.new_scale = 2.0
    with pytest.raises(NotImplementedError, match=r"whether llama\.cpp computes new_scale = 2\.0"):
        check_known(config, LLAMA_CPP[GGUF[family]])


#: Options of a config.json that llama.cpp would compute in another way -> what the message says.
HOSTILE = {
    "llama": ({"hidden_act": "gelu"}, "hidden_act = silu or swish, and this model has gelu"),
    "mistral": ({"sliding_window": 8}, r"sliding_window = 64 \(max_position_embeddings\) or more"),
    "qwen2": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
         "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
        "rope_type = default or linear or yarn, and this model has llama3",
    ),
    "qwen3": ({"is_causal": False}, "is_causal = True, and this model has False"),
    "phi": ({"hidden_act": "gelu"}, "hidden_act = gelu_new or .*, and this model has gelu"),
    "gemma3_text": (
        {"layer_types": ["full_attention"] * 2}, "one sliding_attention, without which it stops"
    ),
    "olmoe": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
         "beta_fast": 16.0, "original_max_position_embeddings": 16}},
        r"beta_fast = 32, and this model has 16\.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", HOSTILE)
def test_a_checkpoint_that_llama_cpp_computes_in_another_way_is_refused(family, tmp_path):
    options, message = HOSTILE[family]
    folder = gguf_checkpoint(tmp_path / "dense", family, **GGUF_FAMILIES[family])
    known_layout(folder)
    edit_json(folder / "config.json", **options)
    assert_refused(NotImplementedError, message, known_layout, folder)


#: Option of a config.json that its template does not have -> what the message says.
UNLIKE = {
    "rms_norm_eps": (1e-3, "layer_norm_rms_epsilon is 1e-06, and config.json has rms_norm_eps = 0"),
    "rope_parameters": ({"rope_theta": 500.0, "rope_type": "default"}, "rope_theta = 500.0"),
    "rope_scaling": (
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        r"rope_freqs.weight is None there, and \[1\.0, .* by config.json",
    ),
    "max_position_embeddings": (128, "llama.context_length is 64 there, and 128 by config.json"),
    "hidden_act": ("gelu", "hidden_act = silu or swish, and this model has gelu"),
    "logits_scaling": (2.0, "logit_scale is 4, and config.json has logits_scaling = 2.0"),
}  # fmt: skip


@pytest.mark.parametrize("option", UNLIKE)
def test_a_template_says_nothing_else_than_the_configuration(option, tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense", hidden_size=32, intermediate_size=64)
    fields = known_layout(dense)[0].fields
    fields["llama.logit_scale"] = fields["llama.rope.freq_base"]._replace(value=4.0)
    # 0 stands for a model without attention, such as Mamba: it contradicts nothing.
    heads = fields["llama.attention.head_count"]._replace(value=0)
    fields["llama.attention.head_count"] = heads
    template = write_container(tmp_path / "full.gguf", known_tensors(dense), fields)
    value, message = UNLIKE[option]
    for given in ({}, {option: value}):
        edit_json(dense / "config.json", **given)
        options = {"type": "Q8_0", "rounding": "nearest", "template": template}
        if given:
            with pytest.raises((ValueError, NotImplementedError), match=message):
                compress(dense, tmp_path / "other.gguf", **options)
        else:
            compress(dense, tmp_path / "x.gguf", **options)
    assert not (tmp_path / "other.gguf").exists()


def test_the_class_of_the_model_counts_and_not_the_one_that_the_configuration_names(tmp_path):
    folder = gguf_checkpoint(tmp_path / "dense", "granite", embedding_multiplier=12.0)
    edit_json(folder / "config.json", architectures=["LlamaForCausalLM"])
    assert_refused(
        NotImplementedError, "GraniteForCausalLM has no known layout", known_layout, folder
    )
