"""The dense model that a pruned one learns from: which one it is, and whether the two fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.model.tokenizer import load_tokenizer
from prunus.pruning.manifest import MANIFEST_NAME, Manifest

__all__ = ["check_shapes", "check_vocabulary", "find_teacher"]


def find_teacher(given: str | Path | None, student: Path) -> Path:
    """The folder of the dense model: the one that was given, or the one that `prunus.json` says was pruned.

    Raises:
        FileNotFoundError: it is not there, or no one says which it is.
        ValueError: what `prunus.json` names has changed since.
    """
    if given is not None:
        return resolve_folder(given)
    if not (student / MANIFEST_NAME).exists():
        raise FileNotFoundError(
            f"{student} has no {MANIFEST_NAME} that tells which model it was pruned from: give it with --teacher"
        )
    manifest = Manifest.load(student)
    try:
        folder = resolve_folder(manifest.source)
    except FileNotFoundError as fault:
        raise FileNotFoundError(
            f"{student} was pruned from {manifest.source!r}, which is not there ({fault}): give it with --teacher"
        ) from fault
    if CheckpointSource(folder).fingerprint != manifest.inputs.checkpoint:
        raise ValueError(
            f"{student} was pruned from {manifest.source}, which has changed since: give the dense model with --teacher"
        )
    return folder


def check_vocabulary(student: CheckpointSource, teacher: CheckpointSource) -> None:
    """See that both give logits for the same tokens.

    Raises:
        ValueError: the sizes differ, or the tokenizers, where both have one.
    """
    mine, its = (source.config.get_text_config().vocab_size for source in (student, teacher))
    folders = student.checkpoint.folder, teacher.checkpoint.folder
    if mine != its:
        raise ValueError(
            f"the teacher {folders[1]} has a vocabulary of {its} tokens, {folders[0]} one of {mine}: logits can be "
            "learnt from a model with the same vocabulary only"
        )
    words = [_words(folder) for folder in folders]
    if None not in words and words[0] != words[1]:
        assert words[0] is not None and words[1] is not None
        token = min(dict(words[0].items() ^ words[1].items()))
        raise ValueError(
            f"the tokenizers of the teacher {folders[1]} and of {folders[0]} differ, at {token!r} for one: logits can "
            "be learnt from a model with the same vocabulary only"
        )


def check_shapes(student: Skeleton, teacher: Skeleton, folder: Path) -> None:
    """See that the blocks of both have the same parameters.

    Raises:
        ValueError: names the first difference.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"the teacher {folder} has {len(teacher)} blocks, the pruned model {len(student)}: block matching needs the "
            "model that was pruned"
        )
    for index in range(len(student)):
        mine, its = (
            {name: tuple(p.shape) for name, p in skeleton.blocks[index].named_parameters()}
            for skeleton in (student, teacher)
        )
        if mine != its:
            name = min(dict(mine.items() ^ its.items()))
            raise ValueError(
                f"{name} of block {index} has the shape {mine.get(name, 'of nothing')} in the pruned model and "
                f"{its.get(name, 'of nothing')} in the teacher {folder}: block matching needs the model that was pruned"
            )


def _words(folder: Path) -> dict[str, int] | None:
    """Token -> id; None where the folder has no tokenizer."""
    try:
        tokenizer: Any = load_tokenizer(folder)
    except ValueError:
        return None
    return dict(tokenizer.get_vocab())
