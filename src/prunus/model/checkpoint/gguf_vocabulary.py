"""The tokenizer of a checkpoint as fields of a GGUF file.

llama.cpp has two kinds of tokenizers that matter here. `llama` merges pieces of text by their
scores, as sentencepiece does. `gpt2` splits text by a regular expression, which has a name, and
then applies a list of merges to the bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunus.model.checkpoint.atomic_files import read_json

#: Kinds of tokens: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# Scores of tokens that the merging of pieces never makes.
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0
_SPACE = "\u2581"

_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]", "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
_WORD = "[^\\r\\n\\p{L}\\p{N}]?"
_REST = "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"


def _words(digits: str) -> str:
    return f"{_ENGLISH}|{_WORD}\\p{{L}}+|{digits}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|{_REST}"


def _cased_words(digits: str, ending: str) -> str:
    return (
        f"{_WORD}{_UPPER}*{_LOWER}+{ending}|{_WORD}{_UPPER}+{_LOWER}*{ending}|{digits}| "
        f"?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n/]*|{_REST}"
    )


# How a tokenizer splits text: whether digits are split first, and its regular expression; None is
# that of GPT-2. -> llama.cpp's name.
_SPLITS = {
    (False, None): "gpt-2",
    (True, None): "smollm",
    (False, _words("\\p{N}")): "qwen2",
    (False, _words("\\p{N}{1,3}")): "dbrx",
    (False, _cased_words("\\p{N}", "")): "tekken",
    (False, _cased_words("\\p{N}{1,3}", _ENGLISH + "?")): "gpt-4o",
}


def add_vocabulary(writer: Any, folder: Path, size: int, architecture: str) -> bool:
    """Add the tokens in a checkpoint's folder to the fields of a GGUF file.

    Ids below `size` without a token get one that no text has. Returns whether the tokenizer merges
    pieces of text by their scores; `ValueError` says what llama.cpp has no name for.
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
    added = [each for each in content.get("added_tokens", []) if each["id"] < size]
    for each in added:
        is_control = each.get("special") or _looks_special(each["content"])
        kinds[each["id"]] = _CONTROL if is_control else _USER_DEFINED
        # llama.cpp looks for these tokens in the text as it is.
        plain = each["content"] if is_control else each["content"].replace(_SPACE, " ")
        tokens[each["id"]] = plain
    writer.add_tokenizer_model("llama" if by_scores else "gpt2")
    writer.add_tokenizer_pre("default" if by_scores else _split(path, content, architecture))
    writer.add_token_list(tokens)
    if by_scores:
        writer.add_token_scores(_scores(model, size, [each["id"] for each in added]))
    writer.add_token_types(kinds)
    return by_scores


def _scores(model: dict[str, Any], size: int, added: list[int]) -> list[float]:
    """The scores of tokens: the earlier a merge, the higher is that of the piece that it makes."""
    ranks: dict[str, int] = {}
    for pair in model["merges"]:
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        ranks.setdefault(left + right, len(ranks))
    scores = [_PADDING_SCORE] * size
    for token, index in model["vocab"].items():
        # Single characters are the result of no merge.
        scores[index] = -float(ranks.get(token, len(ranks)))
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
    """llama.cpp's name of how a tokenizer splits text before it merges bytes."""
    steps = content.get("pre_tokenizer") or {}
    digits, regex, known = False, None, True
    for step in steps.get("pretokenizers", [steps]):
        if step.get("type") == "Digits":
            digits = bool(step.get("individual_digits"))
        elif step.get("type") == "Split" and regex is None:
            regex = step.get("pattern", {}).get("Regex", "")
        elif step.get("type") != "ByteLevel" or step.get("use_regex", True) == bool(regex):
            known = False
    name = _SPLITS.get((digits, regex)) if known else None
    if name is None:
        raise ValueError(
            f"{path} splits text in a way that llama.cpp has no known name for: "
            f"{json.dumps(steps)[:200]}"
        )
    # Names that mean the same splitting as another one, with other rules after it.
    if name == "dbrx" and content["model"].get("ignore_merges"):
        return "llama-bpe"
    return "phi-2" if name == "gpt-2" and architecture == "phi2" else name
