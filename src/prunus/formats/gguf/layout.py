"""What a GGUF file of a checkpoint holds: its fields, and which tensors under which names.

A layout has two makers. `layout_of` knows the families that are listed here; for them the file is
what llama.cpp's own converter writes. `template.Template` takes the layout from a file of any
family.

llama.cpp stores the weights of a model as they are, with three exceptions. Llama's queries and keys
have the rows of a head in another order, because llama.cpp rotates neighbours where transformers
rotates halves. Gemma's norms are stored with the 1 that transformers adds. The experts of a block
are stacked: one tensor (experts, out, in) each for gate, up and down, which has one type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prunus.formats.fixed import LLAMA_CPP, check_fixed, check_known, full_rope
from prunus.formats.gguf.card import metadata_of
from prunus.formats.gguf.file import GgufFile, new_fields, open_gguf
from prunus.formats.gguf.header import GgufField
from prunus.formats.gguf.package import package
from prunus.formats.gguf.types import TYPES
from prunus.formats.gguf.vocabulary import NORMAL, add_vocabulary
from prunus.hardware.process_state import no_stderr
from prunus.model.checkpoint.files import read_json, read_limited
from prunus.model.checkpoint.tensor_files import TensorInfo
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.words import name_patterns

#: Class in transformers -> llama.cpp's name of its kind of model.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "OlmoeForCausalLM": "olmoe",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Gemma3ForCausalLM": "gemma3",
    "PhiForCausalLM": "phi2",
    "Phi3ForCausalLM": "phi3",
}
#: Tensors that llama.cpp never quantises, also those that are matrices.
PLAIN = re.compile(
    r"_norm\.weight$|ffn_gate_inp|ffn_gate_tid2eid|position_embd|token_types|rope_|ssm_conv1d|"
    r"shortconv\.conv\.|altup|laurel|per_layer_model_proj|indexer\.|time_mix_|attn_rel_b"
)
_EXPERT = re.compile(r"(.+\.experts\.)(\d+)\.(\w+)(\.weight)")
# Names of an expert's matrices that the package does not know -> those that it knows.
_LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# Kinds that have experts in every block; so has Mixtral, which is a Llama to llama.cpp.
_OF_EXPERTS = ("olmoe", "qwen2moe", "qwen3moe")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: llama.cpp's name of the tensor.
        shape: Shape in the order of torch, rows first.
        dtype: How it is stored where it has no type.
        sources: Its name in the model, or the names of the weights whose rows it has. Empty where
            the file has no such weight.
        rows: Which rows of all sources it has, in the order of the file; None for all in order.
        columns: Which column of the source each of its columns is; empty where they are in order.
        shift: What is added to every value: 1 for Gemma's norms, else 0.
        values: Returns the content where it has no type; None where that is the source's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[str, ...] = ()
    rows: torch.Tensor | None = None
    columns: tuple[int, ...] = ()
    shift: float = 0.0
    values: Callable[[], torch.Tensor] | None = None

    @property
    def modules(self) -> list[str]:
        """The names of the modules that have this weight, or a part of it."""
        return [source.removesuffix(".weight") for source in self.sources]

    @property
    def module(self) -> str:
        """The first of `modules`; empty where there is none."""
        return next(iter(self.modules), "")

    def plain(self, rows: torch.Tensor) -> torch.Tensor:
        """Its content without a type, from its rows in the checkpoint."""
        rows = rows[:, list(self.columns)] if self.columns else rows
        return rows.to(self.dtype) + self.shift if self.shift else rows.to(self.dtype)

    @property
    def is_matrix(self) -> bool:
        """Whether it may have a type of fewer bits than float32."""
        return len(self.shape) > 1 and not PLAIN.search(self.name)


@dataclass(frozen=True)
class GgufLayout:
    """The fields and tensors of the GGUF file of a model.

    Attributes:
        fields: Key -> value with its type, as the header of a file has them.
        tensors: The tensors in the order of the file.
        unmatched: What a template and its checkpoint do not have in common; see
            `CompressionRecord`.
    """

    fields: dict[str, GgufField]
    tensors: tuple[GgufTensor, ...]
    unmatched: dict[str, list[str]] = field(default_factory=dict)


def block_of(name: str) -> int:
    """The number of the block of a tensor of a file; -1 for one outside the blocks."""
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def weights_stored_once(source: CheckpointSource, skeleton: Skeleton) -> dict[str, str]:
    """Name in the model -> stored name, of each weight of a checkpoint; of tied ones the first."""
    state = skeleton.model.state_dict(keep_vars=True)
    stored = [name for name in state if name in source.stored_names]
    first = {id(state[name]): name for name in reversed(stored)}
    return {name: source.stored_names[name] for name in stored if first[id(state[name])] == name}


def layout_of(source: CheckpointSource, skeleton: Skeleton) -> GgufLayout:
    """The layout of the GGUF file of a checkpoint, by what is known of its family.

    Args:
        source: The checkpoint, with its tokenizer and card.
        skeleton: Its model.

    Raises:
        NotImplementedError: The family has no known layout, or llama.cpp computes this model in
            another way.
        ValueError: The tokenizer has no known form in GGUF files.
    """
    folder, config = source.checkpoint.folder, source.config
    stored = weights_stored_once(source, skeleton).items()
    infos = {name: source.checkpoint.tensors[key] for name, key in stored}
    kind = type(skeleton.model).__name__  # a configuration can name another class
    architecture = ARCHITECTURES.get(kind)
    if architecture is None:
        raise NotImplementedError(
            f"{kind} has no known layout in GGUF files; known are "
            f"{', '.join(sorted(ARCHITECTURES))}. For others give `template`, the file that "
            "llama.cpp's converter makes of the checkpoint"
        )
    described = config.get_text_config()
    check_fixed("llama.cpp", "a GGUF file", described, LLAMA_CPP[architecture])
    check_known(described, LLAMA_CPP[architecture])
    options = described.to_dict()
    tensors = tensors_of(architecture, options, infos)
    _check_experts(kind, architecture, options, tensors)
    writer = new_fields(architecture)
    tensors = [*_rope_factors(writer, options), *tensors]
    _add_metadata(writer, folder, tensors)
    _add_parameters(writer, architecture, options)
    _add_tokenizer(writer, folder, architecture, options)
    # llama.cpp reads no further blocks (MTP) of these families.
    unmatched = {"the checkpoint": name_patterns(source.unused)} if source.unused else {}
    return GgufLayout(writer.fields, tuple(tensors), unmatched)


def tensors_of(
    architecture: str, options: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> list[GgufTensor]:
    """All weights of a model of a known family as its GGUF file has them, in the order of `infos`.

    The experts of a block are one tensor each for gate, up and down; expert 0 comes first.

    Args:
        architecture: llama.cpp's name of the kind of model, one of `ARCHITECTURES`.
        options: The configuration of the text model.
        infos: Name in the model -> shape and dtype of the weight.

    Raises:
        NotImplementedError: llama.cpp has no name for a weight.
    """
    heads = {
        "attn_q": options["num_attention_heads"],
        "attn_k": options.get("num_key_value_heads") or options["num_attention_heads"],
    }
    name_of, tensors = tensor_names(architecture, options["num_hidden_layers"]), []
    sources: dict[str, list[tuple[int, str]]] = {}
    for source in infos:
        expert, name = _EXPERT.fullmatch(source), name_of(source)
        if name is None:
            raise NotImplementedError(
                f"{source} has no place in a GGUF file of kind {architecture}, so this model "
                "cannot be written as one"
            )
        sources.setdefault(name, []).append((int(expert[2]) if expert else 0, source))
    for name, numbered in sources.items():
        several = tuple(source for _, source in sorted(numbered))
        shape = infos[several[0]].shape
        if "_exps." in name:
            shape = (len(several), *shape)
        tensor = GgufTensor(name, shape, infos[several[0]].dtype, several)
        if not tensor.is_matrix:
            tensor = replace(tensor, dtype=torch.float32)
        if architecture == "llama" and (count := heads.get(name.split(".")[-2])):
            # transformers stores the rows of a head as two halves, which it rotates against each
            # other. llama.cpp rotates neighbours, so the rows of the two halves alternate.
            halves = torch.arange(tensor.shape[0]).reshape(count, 2, -1)
            tensor = replace(tensor, rows=halves.transpose(1, 2).reshape(-1))
        elif architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = replace(tensor, shift=1.0)
        tensors.append(tensor)
    return tensors


def tensor_names(architecture: str, blocks: int) -> Callable[[str], str | None]:
    """Which name llama.cpp has for a weight, by its name in the checkpoint or in the model.

    That of an expert is that of all experts. It is None for a weight without one, and of a kind of
    model that the package does not know for all.

    Args:
        architecture: llama.cpp's name of the kind, such as `llama`.
        blocks: Number of blocks, for which there are names.
    """
    gguf = package()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    kind = kinds.get(architecture)
    names = None if kind is None else gguf.get_tensor_name_map(kind, blocks)

    def name_of(source: str) -> str | None:
        if expert := _EXPERT.fullmatch(source):
            source = f"{expert[1]}{_LEAVES.get(expert[3], expert[3])}{expert[4]}"
        return names and names.get_name(source, try_suffixes=(".weight", ".bias"))

    return name_of


def types_in(
    path: Path, folder: Path, tensors: Sequence[GgufTensor], needed: Collection[str]
) -> dict[str, str]:
    r"""Name of a module -> the type of its tensor in another file of the model, or in a list.

    llama-quantize of llama.cpp takes such lists (`--tensor-type-file`). An entry is a regular
    expression for the names of tensors and a type; the first that fits counts. prunus writes and
    reads entries that stand for one name, such as `^blk\.0\.attn_q\.weight$=q4_k`.

    Args:
        path: A GGUF file whose name ends in .gguf, or a list.
        folder: The checkpoint, with its tokenizer.
        tensors: The tensors of the model.
        needed: The first modules of the tensors that the result is about.

    Raises:
        ValueError: The file is of another model, or a tensor has no type that prunus writes; names
            the tensor.
    """
    if path.suffix == ".gguf":
        file = open_same(path, folder, {tensor.name: tensor.shape for tensor in tensors})
        types = {name: tensor.tensor_type.name for name, tensor in file.tensors.items()}
    else:
        entries = [x.rpartition("=") for x in read_limited(path).decode(errors="replace").split()]
        types = {x.strip("^$").replace("\\.", "."): kind.upper() for x, _, kind in entries[::-1]}
        if unknown := types.keys() - {tensor.name for tensor in tensors}:
            raise ValueError(
                f"{path} is not a list of types for this model, which has no tensor "
                f"{min(unknown)[:80]!r}: give lines such as ^blk\\.0\\.attn_q\\.weight$=q4_k"
            )
    chosen = [tensor for tensor in tensors if tensor.module in needed]
    for tensor in chosen:
        if types.get(tensor.name) not in TYPES:
            raise ValueError(
                f"{path} has {types.get(tensor.name, 'no type')} for {tensor.name}, and prunus "
                f"writes {', '.join(TYPES)}; `ignore` keeps a linear as it is, and `head_bits` "
                "embedding and head"
            )
    return {module: types[tensor.name] for tensor in chosen for module in tensor.modules}


def _check_experts(
    kind: str, architecture: str, options: Mapping[str, Any], tensors: list[GgufTensor]
) -> None:
    """Refuse mixtures of experts of which llama.cpp would not find all."""
    stacks, blocks = (
        sum("_exps." in tensor.name for tensor in tensors),
        options["num_hidden_layers"],
    )
    if (kind == "MixtralForCausalLM" or architecture in _OF_EXPERTS) and stacks != 3 * blocks:
        raise NotImplementedError(
            f"a GGUF file of {kind} needs experts in every block, and a checkpoint that stores "
            f"them one by one: this one has {stacks // 3} such blocks of {blocks}"
        )


def vocabulary_of(folder: Path) -> tuple[dict[int, str], int]:
    """The tokens of a checkpoint's tokenizer.json by id, and how many ids it has with added ones.

    Nothing and 0 for a checkpoint without this file.
    """
    path = folder / "tokenizer.json"
    content = read_json(path) if path.exists() else {"model": {}}
    vocabulary = content["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # of pieces with scores
        vocabulary = {piece[0]: index for index, piece in enumerate(vocabulary)}
    added = [entry["id"] for entry in content.get("added_tokens", [])]
    ids = max([*vocabulary.values(), *added], default=-1) + 1
    return {index: token for token, index in vocabulary.items()}, ids


def open_same(
    path: Path, folder: Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> GgufFile:
    """Open a GGUF file of the model of a checkpoint.

    Args:
        path: The file.
        folder: The checkpoint, whose tokens the file must have. One without tokenizer.json is not
            compared.
        shapes: Name -> shape of all tensors that the file must have; None for any tensors.

    Raises:
        FileNotFoundError, ValueError: As `open_gguf`, or the file is of another model; names the
            first difference.
    """
    file, (vocabulary_by_id, _) = open_gguf(path), vocabulary_of(folder)
    ours, theirs = dict[str, object](shapes or {}), dict[str, object]()
    if shapes is not None:
        # A head that is tied to the embedding is not stored again.
        not_again = {"output.weight"} - shapes.keys()
        theirs |= {name: file.shape(name) for name in file.tensors.keys() - not_again}
    tokens, kinds = (file.get(f"tokenizer.ggml.{x}", []) for x in ("tokens", "token_type"))
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
        if kind == NORMAL and index in vocabulary_by_id:
            ours[f"token {index}"], theirs[f"token {index}"] = vocabulary_by_id[index], token
    if tokens and "token_embd.weight" in file.tensors:  # llama.cpp reads no other
        ours["the number of tokens"] = file.shape("token_embd.weight")[0]
        theirs["the number of tokens"] = len(tokens)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{path} is not a file of this model: {name} is {ours.get(name)} in the model and "
                f"{theirs.get(name)} there. Give what llama.cpp's converter makes of the model"
            )
    return file


# --- fields, as llama.cpp's converter writes them ---


def _add_metadata(writer: Any, folder: Path, tensors: list[GgufTensor]) -> None:
    """Name, origin and size of the model, by the rules of the package."""
    gguf = package()
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, None, 0, gguf.GGMLQuantizationType.F32)
    total, *parts = writer.get_total_parameter_count()
    metadata = metadata_of(folder, total)
    metadata.size_label = metadata.size_label or gguf.size_label(total, *parts)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_parameters(writer: Any, architecture: str, options: Mapping[str, Any]) -> None:
    """The shape of the model and the constants that it computes with; see `_PARAMETERS`."""
    for name, families, value in _PARAMETERS:
        if architecture in families:
            number = options[value] if isinstance(value, str) else value(options)
            if number is not None:
                getattr(writer, f"add_{name}")(number)


def known_parameters(
    architecture: str, options: Mapping[str, Any]
) -> tuple[dict[str, GgufField], dict[str, torch.Tensor]]:
    """The fields and the tensors of a known family that follow from its configuration alone."""
    writer = new_fields(architecture)
    tables = {x.name: x.values() for x in _rope_factors(writer, options) if x.values is not None}
    _add_parameters(writer, architecture, options)
    return writer.fields, tables


def _of_scaling(options: Mapping[str, Any], name: str, kinds: Collection[str] = ("yarn",)) -> Any:
    """A parameter of the rotary embedding if it is scaled in one of these ways; else None."""
    rope = full_rope(options)
    return rope.get(name) if rope.get("rope_type") in kinds else None


def _scaling_type(options: Mapping[str, Any]) -> Any:
    kind = _of_scaling(options, "rope_type", ("linear", "longrope", "yarn"))
    return kind and package().RopeScalingType(kind)


def _original_positions(options: Mapping[str, Any]) -> int:
    name = "original_max_position_embeddings"
    rope = full_rope(options)
    return int(rope.get(name) or options.get(name) or options["max_position_embeddings"])


def _head_width(options: Mapping[str, Any]) -> int:
    return int(options.get("head_dim") or options["hidden_size"] // options["num_attention_heads"])


def _rotated_width(options: Mapping[str, Any]) -> int:
    """The columns of a head that are rotated, of families that rotate a share of them."""
    share = {**options, **full_rope(options)}.get("partial_rotary_factor", 1.0)
    return int(share * options["hidden_size"]) // int(options["num_attention_heads"])


def _experts(options: Mapping[str, Any]) -> int | None:
    """How many experts a block has; None for none."""
    return options.get("num_local_experts") or options.get("num_experts") or None


def _sliding_blocks(options: Mapping[str, Any]) -> list[bool] | None:
    """Whether each block has a window; None if every sixth has none, as llama.cpp takes it."""
    sliding = [kind == "sliding_attention" for kind in options["layer_types"]]
    return None if sliding == [index % 6 < 5 for index in range(len(sliding))] else sliding


_ALL = frozenset(ARCHITECTURES.values())
_PHI = frozenset({"phi2", "phi3"})
# Fields of YaRN -> its parameters. llama.cpp reads none but the first for these families.
_YARN = {
    "orig_ctx_len": "original_max_position_embeddings",
    "yarn_ext_factor": "extrapolation_factor",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
# The parameters of known families in the order of the file: the field, by the name of the package's
# method that adds it; the families that have it; and the option of transformers with its value, or
# how it follows from the options. A field whose value is None is left out.
_PARAMETERS: tuple[tuple[str, Collection[str], str | Callable[[Mapping[str, Any]], Any]], ...] = (
    ("block_count", _ALL, "num_hidden_layers"),
    ("context_length", _ALL, "max_position_embeddings"),
    ("embedding_length", _ALL, "hidden_size"),
    ("feed_forward_length", _ALL, "intermediate_size"),
    ("head_count", _ALL, "num_attention_heads"),
    ("head_count_kv", _ALL, lambda x: x.get("num_key_value_heads") or x["num_attention_heads"]),
    ("layer_norm_eps", {"phi2"}, "layer_norm_eps"),
    ("layer_norm_rms_eps", _ALL - {"phi2"}, "rms_norm_eps"),
    ("rope_freq_base", _ALL - {"phi2"}, lambda x: full_rope(x)["rope_theta"]),
    (
        "rope_freq_base_swa",
        _ALL - {"phi2"},
        lambda x: x["rope_parameters"].get("sliding_attention", {}).get("rope_theta"),
    ),
    ("rope_scaling_type", _ALL - {"phi2"}, _scaling_type),
    (
        "rope_scaling_factor",
        _ALL - _PHI,
        partial(_of_scaling, name="factor", kinds=("linear", "yarn")),
    ),
    *(
        (f"rope_scaling_{field}", _ALL - _PHI, partial(_of_scaling, name=option))
        for field, option in _YARN.items()
    ),
    ("expert_count", _ALL, _experts),
    ("expert_used_count", _ALL, lambda x: _experts(x) and x["num_experts_per_tok"]),
    ("expert_feed_forward_length", {"qwen2moe", "qwen3moe"}, "moe_intermediate_size"),
    ("expert_shared_feed_forward_length", {"qwen2moe"}, "shared_expert_intermediate_size"),
    ("key_length", _ALL - _PHI, lambda x: x.get("head_dim")),
    ("value_length", _ALL - _PHI, lambda x: x.get("head_dim")),
    ("vocab_size", {"llama"}, "vocab_size"),
    ("rope_dimension_count", {"llama"}, _head_width),
    ("rope_dimension_count", _PHI, _rotated_width),
    ("rope_scaling_orig_ctx_len", {"phi3"}, _original_positions),
    ("sliding_window", {"phi3"}, lambda x: x.get("sliding_window") or 0),
    ("sliding_window", {"gemma3"}, "sliding_window"),
    ("sliding_window_pattern", {"gemma3"}, _sliding_blocks),
    ("final_logit_softcapping", {"gemma3"}, lambda x: x.get("final_logit_softcapping") or None),
)


def _rope_factors(writer: Any, options: Mapping[str, Any]) -> list[GgufTensor]:
    """Tensors by which frequencies of the rotary embedding are divided, where there are some."""
    rope = full_rope(options)
    factors: dict[str, Any] = {}
    if rope.get("rope_type") == "llama3":
        factors["rope_freqs.weight"] = llama3_factors(rope, options)
    if rope.get("rope_type") == "longrope":
        original = _original_positions(options)
        scale = rope.get("factor") or options["max_position_embeddings"] / original
        grown = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or grown)
        factors["rope_factors_long.weight"] = rope["long_factor"]
        factors["rope_factors_short.weight"] = rope["short_factor"]
    return [
        GgufTensor(
            name, (len(x),), torch.float32, values=partial(torch.tensor, x, dtype=torch.float32)
        )
        for name, x in factors.items()
    ]


def llama3_factors(rope: Mapping[str, Any], options: Mapping[str, Any]) -> list[float]:
    """The factors of Llama 3: 1 for short waves, `factor` for long ones, and a ramp between.

    The same as transformers' `rope_type` "llama3": the ramp is linear in the number of wave lengths
    that fit in the positions of the first training, from `low_freq_factor` to `high_freq_factor`.
    """
    width = _head_width(options)
    steps = torch.arange(0, width, 2, dtype=torch.float32)
    waves = 2 * math.pi * rope["rope_theta"] ** (steps / width)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((rope["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / rope["factor"] + share)).tolist()


def _add_tokenizer(
    writer: Any, folder: Path, architecture: str, options: Mapping[str, Any]
) -> None:
    size = options["vocab_size"]
    by_scores = add_vocabulary(writer, folder, size, architecture)
    # The package logs what users cannot change, such as special tokens in templates of pairs.
    with no_stderr():
        special = package().SpecialVocab(folder, load_merges=not by_scores, n_vocab=size)
        special.add_to_gguf(writer, quiet=True)
    says_bos = "bos" in special.add_special_token
    if architecture == "gemma3" and by_scores:
        writer.add_add_space_prefix(False)
        if not says_bos:
            writer.add_add_bos_token(True)
    if (architecture == "phi2" and not says_bos) or (architecture == "llama" and size == 49152):
        writer.add_add_bos_token(False)
