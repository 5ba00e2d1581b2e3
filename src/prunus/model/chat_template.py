"""A chat template of a checkpoint, applied within limits.

A chat template is a program in the language Jinja that comes with a tokenizer. It reaches no files,
but loops in it can run for ever, and a string that it multiplies can fill memory. So it runs in a
process of its own, which has limited time and memory and returns only the text.
"""

from __future__ import annotations

import math
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Sequence
from typing import Any

_SECONDS = 10
#: Bytes of memory that the template may take, and of text that it may give.
_MEMORY, _TEXT = 2**29, 2**22


def apply_chat_template(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    answer_follows: bool = True,
    **variables: Any,
) -> str:
    """The text that a tokenizer's chat template makes of messages.

    Args:
        variables: more that the template may read, such as `tools` or `enable_thinking`.
    """
    variables["add_generation_prompt"] = answer_follows
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # The child runs Python only, and none of the threads that the warning is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reading)
        _run_child(writing, tokenizer, messages, variables)
    os.close(writing)
    try:
        answer = _read_all(reading)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)  # it has ended, or is late
        os.waitpid(child, 0)
    if answer is None:
        raise ValueError(
            f"the chat template did not end within {_SECONDS} s; its loops are too long. "
            "Do without the template, or correct it"
        )
    kind, text = answer[:1], answer[1:].decode("utf-8", errors="replace")
    if kind == b"+" and len(answer) <= _TEXT:
        return text
    if kind == b"-":
        raise ValueError(f"the chat template cannot be applied: {text}")
    raise ValueError(
        f"the chat template asks for more than {_MEMORY >> 20} MiB of memory or "
        f"{_TEXT >> 20} MiB of text. Do without it, or correct it"
    )


def _rendered(tokenizer: Any, messages: Sequence[dict[str, Any]], variables: dict[str, Any]) -> str:
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **variables)
    except Exception as fault:  # a template can raise any error
        raise ValueError(f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}") from fault
    return str(text)


def _run_child(
    writing: int, tokenizer: Any, messages: Sequence[dict[str, Any]], variables: dict[str, Any]
) -> None:
    """Apply the template, write `+` and the text or `-` and the reason, and end the process."""
    try:
        _limit_process()
        try:
            text = _rendered(tokenizer, messages, variables)
            answer = b"+" + text.encode("utf-8", errors="replace")
        except ValueError as fault:
            answer = b"" if isinstance(fault.__cause__, MemoryError) else b"-" + str(fault).encode()
        answer = answer[: _TEXT + 2]
        while answer:
            answer = answer[os.write(writing, answer) :]
    finally:
        os._exit(0)


def _limit_process() -> None:
    """Limit the time and memory of this process, where the system can."""
    # The process has its own processor time, and the memory that it shares with its parent.
    seconds = math.ceil(_SECONDS) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, taken + _MEMORY))


def _read_all(reading: int) -> bytes | None:
    """All that the child writes until it ends; None if it is late."""
    end, found = time.monotonic() + _SECONDS, bytearray()
    while (left := end - time.monotonic()) > 0:
        if not select.select([reading], [], [], left)[0]:
            break
        piece = os.read(reading, 2**16)
        if not piece:
            return bytes(found)
        found += piece
    return None
