"""Calibration text that the model writes itself (Williams et al. 2024, arXiv 2410.17170).

The model samples from its own distribution: at temperature 1, from the whole vocabulary, and
without a stop at the end-of-text token. After that token it starts another text, as in the packed
windows of its training. The paper also tries temperature schedules, which are not implemented here.

Shape suffixes: N windows, B windows at once, S tokens per window (seqlen), V vocabulary.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from prunus.calibration.windows import Bos, bos_token, check_context

# Windows to write together. Their key-value caches are in memory at the same time.
_BATCH = 32


def start_token(model: Any, tokenizer: Any, bos: Bos) -> int | None:
    """The token with which every window starts; None for a random token per window.

    With `auto` this is BOS if the tokenizer puts BOS before a text; without a tokenizer, it is the
    BOS of the configuration. A model that never saw BOS before text would write text unlike its
    training data, and some instruction-tuned models answer BOS with the same system prompt every
    time.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer; None if it has none.
        bos: What the user chooses.

    Raises:
        ValueError: `bos` is "yes", and neither tokenizer nor configuration has a BOS token.
    """
    if tokenizer is not None or bos == "no":
        return bos_token(tokenizer, bos)
    token = getattr(model.config, "bos_token_id", None)
    return bos_token(tokenizer, bos) if token is None else int(token)


def first_ids(
    model: Any, tokenizer: Any, samples: int, rng: random.Random, token: int | None
) -> torch.Tensor:
    """The token that starts each window, (N,) int64.

    Args:
        model: A causal LM, whose embedding says which tokens there are.
        tokenizer: Its tokenizer, whose special tokens are left out; None if it has none.
        samples: N, the number of windows.
        rng: Draws the random tokens.
        token: The token of all windows; None for a random ordinary token per window.
    """
    if token is not None:
        return torch.full((samples,), token, dtype=torch.int64)
    size = model.get_input_embeddings().num_embeddings
    special: set[int] = set()
    if tokenizer is not None:
        special = set(tokenizer.all_special_ids)
        size = min(size, len(tokenizer))  # many embeddings are padded beyond the vocabulary
    ordinary = [token for token in range(size) if token not in special]
    return torch.tensor(rng.choices(ordinary, k=samples), dtype=torch.int64)


@torch.inference_mode()
def write_windows(model: Any, first_N: torch.Tensor, *, seqlen: int, seed: int) -> torch.Tensor:
    """Continue each first token to a window (N, S) int64 on the CPU, by sampling at temperature 1.

    The same seed gives the same windows on the same kind of device. The global random state stays
    as it was, and so does the model, which runs on its device in evaluation mode.

    Args:
        model: A causal LM.
        first_N: int64, the first tokens, which are part of the windows.
        seqlen: S, the tokens per window.
        seed: Seeds the sampling.

    Raises:
        ValueError: Windows are longer than the context of the model, or its logits are not finite.
    """
    from transformers import GenerationConfig

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check_context(positions, seqlen)
    device = model.get_input_embeddings().weight.device
    original_config = model.generation_config
    was_training = model.training
    # Replace the settings of the model rather than pass them: generate() fills what an argument
    # leaves open, such as the end-of-text token or top_p, from the model's own settings.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=seqlen - 1
    )
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            written = []
            for first_B in first_N.split(_BATCH):
                ids_B1 = first_B.unsqueeze(1).to(device)
                ids_BS = model.generate(
                    ids_B1, attention_mask=torch.ones_like(ids_B1), logits_processor=[check_logits]
                )
                written.append(ids_BS.cpu())
    finally:
        model.generation_config = original_config
        model.train(was_training)
    return torch.cat(written)


def check_logits(ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
    """A logits processor of transformers that changes nothing, and raises where NaN would draw."""
    # The probabilities are checked, not the logits: some models exclude tokens by minus infinity.
    if not torch.isfinite(torch.softmax(logits_BV.float(), dim=-1)).all():
        raise ValueError(
            "the model's logits are not finite, so it cannot write text. Weights are damaged, or "
            "the dtype is too small for this model. Calibration needs another source than self"
        )
    return logits_BV
