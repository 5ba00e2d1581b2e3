"""Shows the doctests of docstrings as code on the site (mkdocs.yml lists this griffe extension).

Markdown would take `>>>` for a quotation, and a result such as `[0.5, 0.5]` for a link.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

#: A doctest: a line that starts with `>>>`, and all lines below it up to an empty one.
_DOCTEST = re.compile(r"(?P<indent>^[ \t]*)>>>.*(?:\n(?![ \t]*$).+)*", re.MULTILINE)


class DoctestBlocks(griffe.Extension):
    """Puts each doctest of a docstring into a fenced block."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of a module, class or function; griffe calls this for each."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """A docstring with its doctests in fenced blocks."""
    return _DOCTEST.sub(r"\g<indent>```pycon\n\g<0>\n\g<indent>```", text)
