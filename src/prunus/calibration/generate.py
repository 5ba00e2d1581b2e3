"""Calibration text that the model writes itself (Williams et al. 2024, arXiv 2410.17170).

The model samples from its own distribution: temperature 1, no truncation of the distribution, and no stop
at the end-of-text token, after which it starts another text, as in the packed windows it was trained on.
(The paper also tries temperature schedules; they are not here.)

Legend: N windows, B windows at once, S tokens per window (seqlen), V vocabulary.
"""

from __future__ import annotations

import random
from typing import Any

import torch

_AT_ONCE = 32  # windows written together; their key-value caches are in memory at the same time


def first_ids(model: Any, tokenizer: Any, samples: int, rng: random.Random) -> torch.Tensor:
    """The token each window starts with, (N,) int64.

    BOS where the tokenizer puts one before a text (or where there is only the config to ask), else a random
    token of the vocabulary: a model that never saw BOS before text would write from outside of what it
    knows, and some instruction-tuned ones answer their BOS with the same system prompt every time.
    """
    size = model.get_input_embeddings().num_embeddings
    if tokenizer is None:
        bos = getattr(model.config, "bos_token_id", None)
        special: set[int] = set()
    else:
        ids = tokenizer("a")["input_ids"]
        bos = ids[0] if ids and ids[0] == tokenizer.bos_token_id else None
        special = set(tokenizer.all_special_ids)
        size = min(size, len(tokenizer))  # many embeddings are padded beyond the vocabulary
    if bos is not None:
        return torch.full((samples,), bos, dtype=torch.int64)
    ordinary = [token for token in range(size) if token not in special]
    return torch.tensor(rng.choices(ordinary, k=samples), dtype=torch.int64)


@torch.inference_mode()
def write_windows(model: Any, first_N: torch.Tensor, *, seqlen: int, seed: int) -> torch.Tensor:
    """Continue each first token to a window, (N, S) int64 on the CPU, by sampling at temperature 1.

    `model` is a loaded causal LM; it runs where it is, in evaluation mode, and is left as it was. The same seed
    gives the same windows on the same kind of device. Raises ValueError where the model's context is shorter
    than `seqlen` or its logits are not finite.
    """
    from transformers import GenerationConfig

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and seqlen > positions:
        raise ValueError(
            f"windows of {seqlen} tokens are longer than the model's {positions} positions"
        )
    device = model.get_input_embeddings().weight.device
    kept_config, was_training = model.generation_config, model.training
    # In the model's place, not as an argument: generate() fills what an argument leaves open, such as the
    # end-of-text token or top_p, from the model's own settings.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=seqlen - 1
    )
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            written = []
            for first_B in first_N.split(_AT_ONCE):
                ids_B1 = first_B.unsqueeze(1).to(device)
                ids_BS = model.generate(
                    ids_B1, attention_mask=torch.ones_like(ids_B1), logits_processor=[_finite]
                )
                written.append(ids_BS.cpu())
    finally:
        model.generation_config = kept_config
        model.train(was_training)
    return torch.cat(written)


def _finite(ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
    # Not the logits themselves: some models rule tokens out with minus infinity.
    if not torch.isfinite(torch.softmax(logits_BV.float(), dim=-1)).all():
        raise ValueError(
            "the model's logits are not finite, so it cannot write its own calibration text"
        )
    return logits_BV
