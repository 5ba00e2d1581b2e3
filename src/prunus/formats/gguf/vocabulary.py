"""The tokenizer of a checkpoint as fields of a GGUF file.

llama.cpp has two kinds of tokenizers that matter here. `llama` merges pieces of text by their
scores, as sentencepiece does. `gpt2` splits text by a regular expression, which has a name, and
then applies a list of merges to the bytes.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from prunus.formats.gguf.file import GgufFile
from prunus.model.checkpoint.files import read_json, write_json

#: Kinds of tokens: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# Scores of tokens that the merging of pieces never makes.
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0
_SPACE = "\u2581"

_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]", "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
_WORD = "[^\\r\\n\\p{L}\\p{N}]?"
_REST = "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_DIGIT, _DIGITS = "\\p{N}", "\\p{N}{1,3}"
# The rule of GPT-2, which the step ByteLevel of a tokenizer may apply by itself.
_GPT_2 = (
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
)  # fmt: skip


def _words(digits: str, english: str = f"{_ENGLISH}|") -> str:
    return f"{english}{_WORD}\\p{{L}}+|{digits}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|{_REST}"


def _cased_words(digits: str, ending: str) -> str:
    return (
        f"{_WORD}{_UPPER}*{_LOWER}+{ending}|{_WORD}{_UPPER}+{_LOWER}*{ending}|{digits}| "
        f"?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n/]*|{_REST}"
    )


_SENTENCES = " ?[^(\\s|.,!?…。，、।۔،)]+"
# Regular expressions that are applied one after the other, each to what the one before left whole:
# what matches becomes a piece, and so does what lies between. -> llama.cpp's names of it, of which
# the first is written where nothing says which. These are the tokenizers' own rules. llama.cpp
# gives the same ids, but for some capitals outside ASCII with tekken and gpt-4o.
_NAMES = {
    (_GPT_2,): "gpt-2 phi-2 mpt olmo jais gigachat a.x-4.0 mellum trillion granite-docling exaone4",
    (_DIGIT, _GPT_2): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    (_words(_DIGIT),): (
        "qwen2 stablelm2 deepseek-r1-qwen kormo f2llmv2 megrez hunyuan solar-open grok-2"
    ),
    (
        f"{_ENGLISH}|{_WORD}[\\p{{L}}\\p{{M}}]+|{_DIGIT}| "
        f"?[^\\s\\p{{L}}\\p{{M}}\\p{{N}}]+[\\r\\n]*|{_REST}",
    ): "qwen35",
    (_words(_DIGITS),): (
        "dbrx smaug-bpe chatglm-bpe llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 "
        "lfm2 glm4 glm5"
    ),
    (_cased_words(_DIGIT, ""),): "tekken",
    (_cased_words(_DIGITS, _ENGLISH + "?"),): "gpt-4o llama4 kanana2 talkie minimax-m2",
    ("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGIT): "deepseek-coder",
    (
        _DIGITS,
        "[一-龥぀-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
        "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ): "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    ("[\\p{P}\\$\\+<=>\\^~\\|`]+", _GPT_2, "[0-9][0-9][0-9]"): "falcon",
    ("[\\p{P}\\$\\+<=>\\^~\\|]+", _GPT_2, "\\p{N}+", "[0-9][0-9][0-9]"): "default",
    (_SENTENCES,): "bloom poro-chat gpt3-finnish",
    (_SENTENCES, _DIGIT): "viking",
    (_words(_DIGIT, ""),): "ufakzeka",
    (
        f"{_ENGLISH}|{_WORD}\\p{{L}}+|\\p{{N}}{{1}}| ?[^\\s\\p{{L}}\\p{{N}}\r\n]+|\\s*[\r\n]+|"
        "\\s+(?!\\S)|\\s+",
    ): "seed-coder",
    (_DIGITS, _words("\\p{N}+")): "minicpm5",
}
_SPLITS = {name: rules for rules, names in _NAMES.items() for name in names.split()}
# With these llama.cpp begins every text with BOS, unless the file says otherwise.
_LLAMA_3 = {
    "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
}  # fmt: skip
# With these a piece that is a token as it stands is not merged from bytes.
_WHOLE_PIECES = _LLAMA_3 | {"glm4", "glm5", "tekken", "minicpm5"}
# In tokenizer_config.json: llama.cpp's name that the file of an imported tokenizer had.
_NOTE = "gguf_pre"


def adds_bos(file: GgufFile) -> bool:
    """Whether a GGUF file does not say that texts begin with BOS, and its kind of splitting does.

    transformers adds BOS only where the file says so.
    """
    stated = file.get("tokenizer.ggml.add_bos_token")
    return stated is None and file.get("tokenizer.ggml.pre") in _LLAMA_3


def drop_added_tokens(file: GgufFile, folder: Path) -> None:
    """Let the tokenizer that was imported to `folder` have the tokens of its GGUF file alone.

    transformers adds those that its class of the family expects, such as `<|endoftext|>`, with ids
    for which the model has no row. A special token that was one of them is none afterwards.
    """
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, size = read_json(path), len(file.get("tokenizer.ggml.tokens", []))
    kept = [token for token in content["added_tokens"] if token["id"] < size]
    gone = {token["content"] for token in content["added_tokens"] if token not in kept}
    write_json(path, content | {"added_tokens": kept})
    named = read_json(config).items()
    write_json(config, {key: None if isinstance(x, str) and x in gone else x for key, x in named})


def restore_split(file: GgufFile, folder: Path) -> None:
    """Let the tokenizer that was imported to `folder` split text as its GGUF file says.

    transformers knows a part of llama.cpp's names and takes GPT-2's rule for all others. The name
    is noted in tokenizer_config.json, for GGUF files that are made of the checkpoint. With a name
    that is not known here the tokenizer stays as it is, and a RuntimeWarning says so. Tokenizers
    that merge by scores do not split text, and stay as they are.
    """
    if file.get("tokenizer.ggml.model") != "gpt2":
        return
    name, config = file.get("tokenizer.ggml.pre", "default"), folder / "tokenizer_config.json"
    write_json(config, read_json(config) | {_NOTE: str(name)})
    if (rules := _SPLITS.get(name)) is None:
        warnings.warn(
            f"prunus does not know how llama.cpp splits text with tokenizers of its kind {name!r}: "
            "that of the imported checkpoint may give other token ids. Copy the tokenizer of the "
            "original model over it",
            RuntimeWarning,
            stacklevel=1,
        )
        return
    content = read_json(folder / "tokenizer.json")
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [split | {"pattern": {"Regex": rule}} for rule in rules]
    steps.append(to_bytes | {"use_regex": False})
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    content["model"]["ignore_merges"] = name in _WHOLE_PIECES
    write_json(folder / "tokenizer.json", content)


def add_vocabulary(writer: Any, folder: Path, size: int, architecture: str) -> bool:
    """Add the tokens in a checkpoint's folder to the fields of a GGUF file.

    Args:
        writer: The package's writer of `new_fields`, which gets the fields.
        folder: The checkpoint, with a tokenizer.json.
        size: Rows of the embedding. Ids below it without a token get one that no text has.
        architecture: llama.cpp's name of the kind of model.

    Returns:
        Whether the tokenizer merges pieces of text by their scores, as sentencepiece does.

    Raises:
        ValueError: There is no tokenizer.json, it does not fit the embedding, or llama.cpp has no
            name for its type or its way to split text.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json, from which a GGUF file gets its tokens; copy it from "
            "the dense model"
        )
    content = read_json(path)
    model = content.get("model", {})
    if model.get("type") != "BPE":
        raise ValueError(
            f"{path}: a tokenizer of type {model.get('type')} cannot be written to a GGUF file"
        )
    by_scores = bool(model.get("byte_fallback"))
    if not by_scores and not model.get("merges"):
        raise ValueError(
            f"{path} has no merges, and llama.cpp needs those of a tokenizer that works on bytes; "
            "copy the tokenizer from the dense model again"
        )
    tokens, kinds = [f"[PAD{index}]" for index in range(size)], [_UNUSED] * size
    for token, index in model["vocab"].items():
        if index >= size:
            raise ValueError(
                f"{path} has a token {index}, and the embedding {size} rows; they do not belong "
                "together"
            )
        is_byte = by_scores and len(token) == 6 and token.startswith("<0x")
        tokens[index], kinds[index] = token, _BYTE if is_byte else NORMAL
    if by_scores and model.get("unk_token") in model["vocab"]:
        kinds[model["vocab"][model["unk_token"]]] = _UNKNOWN
    # The import of a GGUF file may add tokens that the model has no rows for.
    added = [
        token_entry for token_entry in content.get("added_tokens", []) if token_entry["id"] < size
    ]
    for token_entry in added:
        is_control = token_entry.get("special") or _looks_special(token_entry["content"])
        kinds[token_entry["id"]] = _CONTROL if is_control else _USER_DEFINED
        # llama.cpp looks for these tokens in the text as it is.
        tokens[token_entry["id"]] = (
            token_entry["content"] if is_control else token_entry["content"].replace(_SPACE, " ")
        )
    writer.add_tokenizer_model("llama" if by_scores else "gpt2")
    writer.add_tokenizer_pre("default" if by_scores else _split(path, content, architecture))
    writer.add_token_list(tokens)
    if by_scores:
        writer.add_token_scores(_scores(model, size, [token_entry["id"] for token_entry in added]))
    writer.add_token_types(kinds)
    return by_scores


def _scores(model: dict[str, Any], size: int, added: list[int]) -> list[float]:
    """The scores of tokens: the earlier a merge, the higher is that of the piece that it makes."""
    order: dict[str, int] = {}
    for pair in model["merges"]:
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        order.setdefault(left + right, len(order))
    scores = [_PADDING_SCORE] * size
    for token, index in model["vocab"].items():
        # Single characters are the result of no merge.
        scores[index] = -float(order.get(token, len(order)))
    for index in added:
        scores[index] = _ADDED_SCORE
    return scores


def _looks_special(token: str) -> bool:
    """Whether a token is meant to control a model although its tokenizer does not say so."""
    return token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or (
        (token.startswith(("<|", "<\uff5c")) and token.endswith(("|>", "\uff5c>")))
        or (token.startswith("<unused") and token.endswith(">"))
    )


def _split(path: Path, content: dict[str, Any], architecture: str) -> str:
    """llama.cpp's name of how a tokenizer splits text before it merges bytes.

    Names that mean the same splitting differ in what follows it. An imported tokenizer keeps that
    of its GGUF file.
    """
    steps, config = content.get("pre_tokenizer") or {}, path.with_name("tokenizer_config.json")
    note = read_json(config).get(_NOTE) if config.is_file() else None
    rules, whole = _rules(steps), bool(content["model"].get("ignore_merges"))
    names = [name for name, named_rules in _SPLITS.items() if named_rules == rules]
    if note in names or (note is not None and note not in _SPLITS):
        return str(note)
    if not names:
        raise ValueError(
            f"{path} splits text in a way that llama.cpp has no known name for: "
            f"{json.dumps(steps)[:200]}"
        )
    name = min(names, key=lambda name: (name in _WHOLE_PIECES) != whole)
    return "phi-2" if name == "gpt-2" and architecture == "phi2" else name


def _rules(steps: dict[str, Any]) -> tuple[str, ...] | None:
    """The regular expressions of a step or a sequence of steps; None where it has other steps."""
    rules = []
    for step in steps.get("pretokenizers", [steps]):
        kind, parts = step.get("type"), (step.get("behavior"), bool(step.get("invert")))
        if kind == "Digits" and step.get("individual_digits"):
            rules.append(_DIGIT)
        elif kind == "Split" and parts in (("Isolated", False), ("Removed", True)):
            rules.append(step.get("pattern", {}).get("Regex", ""))
        elif kind != "ByteLevel":
            return None
        elif step.get("use_regex", True):
            rules.append(_GPT_2)
    return tuple(rules)
