"""Stop sequences in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Shows a text, piece by piece, up to the first stop sequence.

    The end of a piece may be the beginning of a stop sequence. It is held back until the next
    pieces tell.

    Attributes:
        found: whether a stop sequence was met. From then on nothing comes through.

    >>> text = StopText(["END"])
    >>> [text.add(piece) for piece in ("one E", "N two EN", "D three")], text.found
    (['one ', 'EN two ', ''], True)
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The text that can be shown after one more piece."""
        if self.found:
            return ""
        text = self._held + piece
        cut = cut_at_stop(text, self._stop)
        if cut != text:
            self.found = True
            self._held = ""
            return cut
        shown = len(text) - self._length_of_beginning(text)
        self._held = text[shown:]
        return text[:shown]

    def rest(self) -> str:
        """The text that was held back, for a text that ends here."""
        held, self._held = self._held, ""
        return held

    def _length_of_beginning(self, text: str) -> int:
        """Length of the longest end of a text with which a stop sequence begins."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:length])
            ),
            default=0,
        )


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the stop sequence that begins first.

    >>> cut_at_stop("one, two. three", [".", ","])
    'one'
    """
    found = [position for sequence in stop if (position := text.find(sequence)) >= 0]
    return text[: min(found)] if found else text
