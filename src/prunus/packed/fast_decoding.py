"""One call that gives a loaded model everything from prunus besides its linears."""

from __future__ import annotations

from torch import nn

from prunus.packed.attention import use_decode_attention
from prunus.packed.norm import use_decode_norms
from prunus.packed.pages import use_large_pages
from prunus.packed.rotary import use_decode_rotary


def use_fast_decoding(model: nn.Module) -> None:
    """Give a loaded model prunus's attention, norms, rotary embedding and large pages.

    Each part is used only where it computes what the model computes, and only for one token at a
    time; prompts run as before. A packed model gets all of this when it is loaded.
    """
    use_decode_attention(model)
    use_decode_norms(model)
    use_decode_rotary(model)
    use_large_pages(model)
