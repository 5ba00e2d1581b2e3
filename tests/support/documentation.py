"""The Markdown pages of the repository, taken apart for the tests in tests/docs."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent, indent

from places import REPOSITORY

#: A comment before a block says what it is for:
#: `parse only: why`          its commands are checked and not run
#: `write: FILE`              it is a file of the repository
#: `before: FILE: LINE`       it stands before the first line of the file that contains LINE,
#: `after: FILE: LINE`        after it,
#: `instead of: FILE: LINE`   or in its place
#: `as in: FILE`              it stands there already
_COMMENT = re.compile(r"<!-- (?P<verb>[a-z ]+): (?P<rest>.+) -->")
_MODELS = re.compile(r"<!-- models: (?P<names>.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its first line in the page, and its comment."""

    language: str
    text: str
    line: int
    comment: re.Match[str] | None

    @property
    def runs(self) -> bool:
        """Whether its commands can run here."""
        return self.comment is None or self.comment["verb"] != "parse only"

    def commands(self) -> list[list[str]]:
        """The commands of a shell block, as words; comments and continued lines are understood."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [each for each in words if each]

    def enter(self, root: Path) -> Path | None:
        """Do what the comment says in a copy of the repository; the file, or None without one."""
        if self.comment is None or not self.runs:
            return None
        name, _, line = self.comment["rest"].partition(": ")
        path, text = root / name, f"{self.text}\n"
        if self.comment["verb"] == "write":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if self.comment["verb"] == "as in":
            assert dedent(text) in dedent("".join(lines)).replace("\n    ", "\n")
            return path
        place = next(at for at, found in enumerate(lines) if line in found)
        indented = indent(text, lines[place][: -len(lines[place].lstrip())])
        end = place + (self.comment["verb"] != "before")
        lines[end - (self.comment["verb"] == "instead of") : end] = [indented]
        path.write_text("".join(lines), encoding="utf-8")
        return path


def pages() -> list[Path]:
    return sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])


def models(page: Path) -> list[str]:
    """The folders of models that the commands of a page expect, from its comment `models:`."""
    found = _MODELS.search(page.read_text(encoding="utf-8"))
    return [name.strip() for name in found["names"].split(",")] if found else []


def blocks(page: Path) -> Iterator[Block]:
    opened: tuple[str, int, re.Match[str] | None] | None = None
    inside: list[str] = []
    before = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            if opened:
                inside.append(line)
            before = line or before
        elif opened is None:
            opened = (line[3:].strip(), number, _COMMENT.fullmatch(before))
        else:
            language, first, comment = opened
            yield Block(language, "\n".join(inside), first, comment)
            opened, inside, before = None, [], ""


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of all lines outside fenced blocks."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line
