"""All that a loaded model can have of prunus besides its linears, in one call."""

from __future__ import annotations

from torch import nn

from prunus.packed.attention import use_decode_attention
from prunus.packed.norm import use_decode_norms
from prunus.packed.pages import use_large_pages
from prunus.packed.rotary import use_decode_rotary

__all__ = ["use_fast_decoding"]


def use_fast_decoding(model: nn.Module) -> None:
    """Give a loaded model prunus's attention, norms and rotary embedding for one token at a time, and large pages.

    Each only where it computes what the model does; prompts take the way they took. Packed models have it from loading.
    """
    use_decode_attention(model)
    use_decode_norms(model)
    use_decode_rotary(model)
    use_large_pages(model)
