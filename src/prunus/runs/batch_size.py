"""How many calibration windows go through a block in one forward pass. Imports no torch."""

from __future__ import annotations

# Tokens of one forward pass: enough for large matrix products, few enough to stay in the cache.
_TOKENS_PER_BATCH = 4096


def windows_per_batch(samples: int, window_tokens: int, for_training: bool = False) -> int:
    """The default batch size, at least 1 window.

    >>> windows_per_batch(samples=128, window_tokens=512)
    8
    >>> windows_per_batch(samples=128, window_tokens=512, for_training=True)
    4
    >>> windows_per_batch(samples=3, window_tokens=512)
    3
    """
    windows = min(samples, _TOKENS_PER_BATCH // window_tokens)
    return max(1, windows // 2 if for_training else windows)
