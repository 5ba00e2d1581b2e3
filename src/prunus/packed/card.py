"""The section of a model card that says how a packed checkpoint is loaded."""

from __future__ import annotations

from prunus.model.checkpoint.card import add_tags, with_fields

__all__ = ["packed_card", "unpacked_card"]

_TITLE = "\n## Packed by prunus\n"
_SECTION = """
The linears are stored in the packed format (`docs/reference/packed-format.md` of prunus). Install
prunus, then:

```python
import prunus
from transformers import LOADER

model = LOADER.from_pretrained("this folder")
```

`prunus unpack` turns it into an ordinary checkpoint again.
"""


def packed_card(readme: str | None, loader: str = "AutoModelForCausalLM") -> str:
    """Return a model card that ends with how to load a packed checkpoint.

    Its library is prunus, because transformers alone cannot load it.

    Args:
        readme: the card of the source, or None.
        loader: the class of transformers that loads it.
    """
    text = (readme or "# A packed model\n") + _TITLE + _SECTION.replace("LOADER", loader)
    return with_fields(add_tags(text, ["prunus", "packed"]), {"library_name": "prunus"})


def unpacked_card(readme: str | None) -> str:
    """Return the card of a packed checkpoint without what `packed_card` added."""
    before, _, after = (readme or "# An unpacked model\n").partition(_TITLE)
    text = before + after.partition(_SECTION[-20:])[2]
    return with_fields(add_tags(text, [], ["packed"]), {"library_name": "transformers"})
