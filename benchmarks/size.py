"""The size of the project by room, beside the last release: `make size`.

It prints statements of Python (without docstrings), lines of C++ and words of pages. Docstrings,
comments and blank lines are not counted: they explain, and are wanted. CONTRIBUTING.md says what a
change that adds much is asked.

    python benchmarks/size.py [REVISION]    # a commit or tag to compare with, instead of a release
"""

import argparse
import ast
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
#: The last release, and the commit that it was made from.
RELEASE, COMMIT = "0.4.0", "ac0020d2"
#: Where statements are counted.
PYTHON = ("src", "tests", "benchmarks", "examples", "docs")


def statements(text: str) -> int:
    """The number of statements of a file, without docstrings.

    >>> statements('"A docstring."\\nx = 1\\nif x:\\n    x = 2\\n')
    3
    """
    tree = ast.parse(text)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    count = 0
    for node in ast.walk(tree):
        count += isinstance(node, ast.stmt)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            count -= 1
    return count


def measure(name: str, text: str) -> Iterator[tuple[tuple[str, str], int]]:
    """The figures that a file adds to: what is counted, and the room it belongs to."""
    path = PurePosixPath(name)
    top, suffix = path.parts[0], path.suffix
    if suffix == ".py" and top in PYTHON:
        yield ("statements", top), statements(text)
        if name.startswith("src/prunus/"):
            yield ("statements", f"src/{path.parts[2].removesuffix('.py')}"), statements(text)
    elif suffix in {".cpp", ".h"}:
        yield ("lines of C++", top), len(text.splitlines())
    elif suffix == ".md":
        room = "/".join(path.parts[:2]) if len(path.parts) > 2 else top
        yield ("words", room), len(text.split())
        if top == "docs":
            yield ("words", "all pages"), len(text.split())


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout


def count(revision: str | None) -> Counter[tuple[str, str]]:
    """The figures of a revision, or of the files as they are now."""
    total: Counter[tuple[str, str]] = Counter()
    listing = ("ls-tree", "-r", "--name-only", revision) if revision else ("ls-files",)
    for name in git(*listing).splitlines():
        if PurePosixPath(name).suffix in {".py", ".cpp", ".h", ".md"}:
            if revision:
                text = git("show", f"{revision}:{name}")
            elif (ROOT / name).exists():
                text = (ROOT / name).read_text(encoding="utf-8")
            else:
                continue
            for key, value in measure(name, text):
                total[key] += value
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("revision", nargs="?", default=COMMIT)
    revision = parser.parse_args().revision
    now = count(None)
    try:
        before = count(revision)
    except subprocess.CalledProcessError:
        print(f"This clone has no commit {revision}, so nothing stands beside the figures.")
        before = Counter()
    print(f"{'':38}{RELEASE if revision == COMMIT else revision:>10}{'now':>10}{'change':>10}")
    for kind, room in sorted({*now, *before}):
        old, new = before[kind, room], now[kind, room]
        print(f"{kind:14}{room:24}{old:10,}{new:10,}{new - old:+10,}")


if __name__ == "__main__":
    main()
