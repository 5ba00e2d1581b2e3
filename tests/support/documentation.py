"""The Markdown pages of the repository, taken apart for the tests in tests/docs."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from places import REPOSITORY

#: `<!-- parse only: why -->` before a block: its commands are checked and not run.
_PARSE_ONLY = re.compile(r"<!-- parse only: .+ -->")
_MODELS = re.compile(r"<!-- models: (?P<names>.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its first line in the page, and whether it is run."""

    language: str
    text: str
    line: int
    runs: bool

    def commands(self) -> list[list[str]]:
        """The commands of a shell block, as words; comments and continued lines are understood."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [each for each in words if each]


def pages() -> list[Path]:
    return sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])


def models(page: Path) -> list[str]:
    """The folders of models that the commands of a page expect, from its comment `models:`."""
    found = _MODELS.search(page.read_text(encoding="utf-8"))
    return [name.strip() for name in found["names"].split(",")] if found else []


def blocks(page: Path) -> Iterator[Block]:
    opened: tuple[str, int, bool] | None = None
    inside: list[str] = []
    before = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            if opened:
                inside.append(line)
            before = line or before
        elif opened is None:
            opened = (line[3:].strip(), number, not _PARSE_ONLY.fullmatch(before))
        else:
            language, first, runs = opened
            yield Block(language, "\n".join(inside), first, runs)
            opened, inside, before = None, [], ""


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of all lines outside fenced blocks."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line
