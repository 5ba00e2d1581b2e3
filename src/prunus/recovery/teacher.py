"""Whether the dense model can teach the pruned one: both must give logits for the same tokens."""

from __future__ import annotations

from prunus.model.source import CheckpointSource
from prunus.model.tokenizer import token_ids

__all__ = ["check_vocabulary"]


def check_vocabulary(student: CheckpointSource, teacher: CheckpointSource) -> None:
    """Check that student and teacher give logits for the same tokens.

    Raises:
        ValueError: the sizes of the vocabularies differ, or the tokenizers do. Tokenizers are
            compared only if both folders have one.
    """
    student_size, teacher_size = (
        source.config.get_text_config().vocab_size for source in (student, teacher)
    )
    folders = student.checkpoint.folder, teacher.checkpoint.folder
    if student_size != teacher_size:
        raise ValueError(
            f"the teacher {folders[1]} has a vocabulary of {teacher_size} tokens, {folders[0]} one "
            f"of {student_size}: give a teacher with the same vocabulary"
        )
    student_ids, teacher_ids = (token_ids(folder) for folder in folders)
    if student_ids is None or teacher_ids is None or student_ids == teacher_ids:
        return
    token = min(dict(student_ids.items() ^ teacher_ids.items()))
    raise ValueError(
        f"the tokenizers of the teacher {folders[1]} and of {folders[0]} differ, "
        f"at {token!r} for one: give a teacher with the same vocabulary"
    )
