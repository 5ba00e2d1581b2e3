"""The tokenizer or the image processor in a checkpoint's folder, and its chat template."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoImageProcessor, AutoTokenizer

from prunus.hardware.machine import process_memory
from prunus.hardware.process_state import no_warnings
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.config import check_processor_files
from prunus.model.open_folder import OpenFolder
from prunus.words import reason

#: The files that show that an adapter has a tokenizer of its own.
_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
#: What loads -> the files of which a folder has at least one.
_GLOBS = {
    AutoTokenizer: ("tokenizer*", "*vocab*", "*.model", "merges.txt"),
    AutoImageProcessor: ("*processor_config.json",),
}
_TOKENIZER_REMEDY = (
    "copy its files from the dense model; for calibration or perplexity you may also give token "
    "ids instead: a .safetensors file with input_ids"
)
#: Seconds that a chat template may take.
_SECONDS = 10
#: Bytes of memory that the template may take, and of text that it may give.
_MEMORY, _TEXT = 2**29, 2**22
_TOO_MUCH = (
    f"the chat template asks for more than {_MEMORY >> 20} MiB of memory or {_TEXT >> 20} MiB of "
    "text. Do without it, or correct it"
)


def load_tokenizer(folder: OpenFolder) -> Any:
    """The transformers tokenizer of a checkpoint folder.

    Raises:
        ValueError: There is none, a number in its files is beyond all limits, or it cannot be
            loaded; quotes the reason in one line.
    """
    return _load_processor(AutoTokenizer, folder, "tokenizer", _TOKENIZER_REMEDY)


def check_tokenizer(folder: OpenFolder) -> None:
    """Check that a checkpoint folder has files of a tokenizer, without reading any of them.

    Raises:
        ValueError: It has none.
    """
    _check_files(AutoTokenizer, folder.path, "tokenizer", _TOKENIZER_REMEDY)


def tokenizer_of_loaded(model: Any, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a loaded transformers model, from the folder it was loaded from.

    Raises:
        ValueError: The model does not say where it was loaded from, or there is no tokenizer.
        FileNotFoundError: The folder is gone.
    """
    if not (name := str(getattr(model, "name_or_path", "") or "")):
        raise ValueError("the model does not say where it was loaded from")
    return load_tokenizer(open_folder(name, trust_remote_code))


def load_image_processor(folder: OpenFolder) -> Any:
    """The transformers image processor of a checkpoint folder.

    It resizes and normalises by Pillow, so that every host computes the same pixel values.

    Raises:
        ValueError: There is none, a number in its files is beyond all limits, or it cannot be
            loaded; quotes the reason in one line.
    """
    remedy = "copy its preprocessor_config.json from the dense model"
    return _load_processor(AutoImageProcessor, folder, "image processor", remedy, backend="pil")


def _load_processor(loader: Any, folder: OpenFolder, what: str, remedy: str, **options: Any) -> Any:
    """What a class of transformers loads from a folder.

    Messages call it `what`, and end with `remedy`. `options` are those of `from_pretrained`.
    """
    path = folder.path
    folder.check_config()
    check_processor_files(path)
    options["trust_remote_code"] = folder.trust_remote_code
    try:
        return loader.from_pretrained(path, local_files_only=True, **options)
    except Exception as error:  # transformers raises errors of many kinds for missing or bad files
        _check_files(loader, path, what, remedy)
        raise ValueError(
            f"{path}: the {what} could not be loaded ({reason(error)}); {remedy}"
        ) from error


def _check_files(loader: Any, folder: Path, what: str, remedy: str) -> None:
    """Say plainly that files are missing: transformers asks at length for something else."""
    if not any(path for glob in _GLOBS[loader] for path in folder.glob(glob)):
        raise ValueError(f"{folder} has no {what}: {remedy}")


def token_ids(folder: OpenFolder) -> dict[str, int] | None:
    """Token -> id of a checkpoint's tokenizer; None if the folder has no tokenizer."""
    try:
        tokenizer = load_tokenizer(folder)
    except ValueError:
        return None
    return dict(tokenizer.get_vocab())


class Vocabulary(NamedTuple):
    """What a model's token ids mean.

    Attributes:
        model: How messages name the model.
        size: Number of token ids; None if nobody knows it.
        folder: The checkpoint with the tokenizer; None if there is none to compare.
    """

    model: str
    size: int | None
    folder: OpenFolder | None


def check_same_vocabulary(first: Vocabulary, second: Vocabulary, remedy: str) -> None:
    """Check that two models have the same tokens: sizes, and tokenizers if both have one.

    Args:
        first: The vocabulary of one model.
        second: The vocabulary of the other.
        remedy: What the user can do, as the end of the message.

    Raises:
        ValueError: They differ; names both sizes or one token.
    """
    if None not in (first.size, second.size) and first.size != second.size:
        raise ValueError(
            f"{first.model} has a vocabulary of {first.size} tokens, {second.model} one of "
            f"{second.size}: {remedy}"
        )
    ids, others = (
        None if model.folder is None else token_ids(model.folder) for model in (first, second)
    )
    if ids is not None and others is not None and first.size is not None:
        # A class of transformers may add tokens that the model has no rows for.
        ids, others = ({x: y for x, y in of.items() if y < first.size} for of in (ids, others))
    if ids is None or others is None or ids == others:
        return
    token = min(dict(ids.items() ^ others.items()))
    raise ValueError(
        f"the tokenizers of {first.model} and of {second.model} differ, at {token!r} for one: "
        f"{remedy}"
    )


# --- the chat template, applied within limits ---

# A chat template is a program in the language Jinja that comes with a tokenizer. It reaches no
# files, but loops in it can run for ever, and a string that it multiplies can fill memory. So it
# runs in a process of its own, which has limited time and memory and returns only the text.


def apply_chat_template(
    tokenizer: Any,
    chats: Sequence[Sequence[dict[str, Any]]],
    *,
    answer_follows: bool = True,
    **variables: Any,
) -> list[str]:
    """The texts that a tokenizer's chat template makes of chats, all in one process.

    To begin a process takes tenths of a second where this one has a large model in memory.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        chats: Lists of messages. Each message has a `role` and a `content`.
        answer_follows: End with the beginning of an answer, which a model then continues.
        variables: More that the template may read, such as `tools` or `enable_thinking`.

    Raises:
        ValueError: The template is damaged, refuses a chat, takes longer than ten seconds for one,
            or asks for more than 512 MiB of memory or 4 MiB of text.
    """
    variables["add_generation_prompt"] = answer_follows
    forking = multiprocessing.get_context("fork")
    reading, writing = forking.Pipe(duplex=False)
    child = forking.Process(target=_run_child, args=(writing, tokenizer, chats, variables))
    with no_warnings():
        # The child runs Python only, and none of the threads that the warning is about.
        child.start()
    writing.close()
    try:
        return [_receive(reading) for _ in chats]
    finally:
        reading.close()
        child.kill()
        child.join()


def _receive(reading: Any) -> str:
    """The next text that the child sends.

    Raises:
        ValueError: See `apply_chat_template`.
    """
    if not reading.poll(_SECONDS):
        raise ValueError(
            f"the chat template did not end within {_SECONDS} s; its loops are too long. "
            "Do without the template, or correct it"
        )
    try:
        text, fault = reading.recv()
    except EOFError:  # the child has ended without an answer
        text, fault = "", _TOO_MUCH
    if fault:
        raise ValueError(fault)
    return str(text)


def _run_child(
    writing: Any,
    tokenizer: Any,
    chats: Sequence[Sequence[dict[str, Any]]],
    variables: dict[str, Any],
) -> None:
    """Apply the template, and send of each chat the text, and what is wrong, if anything is."""
    _limit_process(len(chats))
    for messages in chats:
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, **variables)
            data = str(text).encode(errors="replace")
            writing.send((data.decode(), "") if len(data) < _TEXT else ("", _TOO_MUCH))
        except MemoryError:
            writing.send(("", _TOO_MUCH))
        except Exception as fault:  # a template can raise any error
            writing.send(("", f"the chat template cannot be applied: {reason(fault)}"))


def _limit_process(chats: int) -> None:
    """Limit the processor time of this process, and the memory beyond what its parent had."""
    seconds = int(chats * _SECONDS) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    if taken := process_memory("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, taken + _MEMORY))
