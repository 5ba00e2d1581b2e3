"""How much llama.cpp's formats lose in models that were measured, to place a KL divergence.

The figures are those of docs/results/proof.json and proof-windows.json: the mean KL divergence from
the dense model in nats per token, on WikiText-2 and on Python code. Imports no torch.
"""

from __future__ import annotations

#: llama.cpp's name of the kind of model -> the model, and for prose and for code the loss of each
#: format, the least first.
LOSSES: dict[str, tuple[str, dict[str, dict[str, float]]]] = {
    "qwen2": ("Qwen2.5-Coder-1.5B", {
        "prose": {"Q8_0": 0.00081, "Q4_K_M": 0.025, "Q3_K_M": 0.087, "Q2_K": 0.30},
        "code": {"Q8_0": 0.00039, "Q4_K_M": 0.015, "Q3_K_M": 0.050, "Q2_K": 0.18},
    }),
    "gemma3": ("Gemma 3 270M", {
        "prose": {"Q8_0": 0.0036, "Q4_K_M": 0.054, "Q2_K": 0.31},
        "code": {"Q8_0": 0.0048, "Q4_K_M": 0.060, "Q2_K": 0.32},
    }),
    "llama": ("SmolLM2-135M", {
        "prose": {"Q8_0": 0.0057, "Q5_K_M": 0.025, "Q4_K_M": 0.054, "Q3_K_M": 0.13, "Q2_K": 0.35},
        "code": {"Q8_0": 0.0048, "Q5_K_M": 0.023, "Q4_K_M": 0.049, "Q3_K_M": 0.13, "Q2_K": 0.34},
    }),
}  # fmt: skip
#: The text to score that is code; all others are compared with prose.
CODE = "python-code"
# A loss is about that of a format if it differs from it by less than this share.
_ABOUT = 0.1


def models_of(architecture: str = "") -> str:
    """The models whose files of llama.cpp are compared with: of one kind, or all if it has none."""
    return ", ".join(model for model, _ in _of(architecture))


def place(kl: float, text: str, architecture: str = "") -> str:
    """How a KL divergence compares with that of formats that people know.

    Args:
        kl: The mean, in nats per token.
        text: The name of the text.
        architecture: llama.cpp's name of the kind of model. If no such model was measured, the
            range of all is named.

    >>> place(0.012, "wikitext2", "qwen2")
    'more than Q8_0 (0.00081) and less than Q4_K_M (0.025)'
    >>> place(0.05, "c4")
    'about as much as Q4_K_M (0.025 to 0.054)'
    """
    tables = [losses["code" if text == CODE else "prose"] for _, losses in _of(architecture)]
    less, same, more = list[str](), list[str](), list[str]()
    for name in [x for x in tables[-1] if all(x in table for table in tables)]:
        low, high = (end(table[name] for table in tables) for end in (min, max))
        near = low * (1 - _ABOUT) <= kl <= high * (1 + _ABOUT)
        group = same if near else less if kl > high else more
        group.append(f"{name} ({low}{f' to {high}' if high > low else ''})")
    between = [f"more than {x}" for x in less[-1:]] + [f"less than {x}" for x in more[:1]]
    return f"about as much as {same[0]}" if same else " and ".join(between)


def _of(architecture: str) -> list[tuple[str, dict[str, dict[str, float]]]]:
    return [LOSSES[architecture]] if architecture in LOSSES else [*LOSSES.values()]
