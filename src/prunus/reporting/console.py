"""The terminal as prunus writes to it: names are never markup, and control characters are escaped.

Names of folders, checkpoints, datasets and tasks are written by strangers, and so are reports and
generated text. rich reads square brackets as markup, and a terminal obeys escape sequences. Both
end here: everything that prunus shows is printed by `TerminalConsole` or `printable`.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

# Control characters other than tab and newline, marks that reorder text, and lone surrogates, which
# stand for the bytes of a file name that is not UTF-8 and cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Escape the characters of `text` that a terminal obeys or cannot show.

    >>> print(printable("model\x1b[2J, caf\u00e9\x9b31m"))
    model\x1b[2J, café\x9b31m
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class TerminalConsole(Console):
    """A console that reads no text as markup or emoji, and that passes on no control character."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into text. rich also measures the result, so it is escaped here already."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Turn anything into segments, of which only rich's own control codes stay as they are."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def on_broken_pipe(self) -> None:
        """Leave the error to the caller, who knows what is lost. rich would end the process."""
        raise  # noqa: PLE0704 (rich calls this while it handles the error)


class _ForgivingStream(io.TextIOBase):
    """A text stream that drops what the stream below it does not take.

    Progress is not a result: a run does not end because nobody reads its progress any more.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


def progress_console() -> Console:
    """Return a console on standard error that works on when nobody reads it any more."""
    return TerminalConsole(file=_ForgivingStream(sys.stderr))
