"""Calibration text that the model writes itself (Williams et al. 2024, arXiv 2410.17170).

The model samples from its own distribution: temperature 1, no truncation of the distribution, and no stop at the
end-of-text token, after which it starts another text, as in the packed windows it was trained on. (The paper
also tries temperature schedules; they are not here.)

Legend: N windows, S tokens per window (seqlen).
"""

from __future__ import annotations

import random
from typing import Any

import torch

_AT_ONCE = 32  # windows written together; their key-value caches are in memory at the same time


def first_ids(model: Any, tokenizer: Any, samples: int, rng: random.Random) -> torch.Tensor:
    """The token each window starts with, (N,) int64.

    BOS where the tokenizer puts one before a text (or where there is only the config to ask), else a random token
    of the vocabulary: a model that never saw BOS before text would write from outside of what it knows, and some
    instruction-tuned ones answer their BOS with the same system prompt every time.
    """
    if tokenizer is None:
        bos = getattr(model.config, "bos_token_id", None)
        special: set[int] = set()
        size = model.get_input_embeddings().num_embeddings
    else:
        ids = tokenizer("a")["input_ids"]
        bos = ids[0] if ids and ids[0] == tokenizer.bos_token_id else None
        special = set(tokenizer.all_special_ids)
        size = len(tokenizer)
    if bos is not None:
        return torch.full((samples,), bos, dtype=torch.int64)
    ordinary = [token for token in range(size) if token not in special]
    return torch.tensor(rng.choices(ordinary, k=samples), dtype=torch.int64)


@torch.inference_mode()
def write_windows(model: Any, first_N: torch.Tensor, *, seqlen: int, seed: int) -> torch.Tensor:
    """Continue each first token to a window, (N, S) int64 on the CPU, by sampling at temperature 1.

    `model` is a loaded causal LM; it runs where it is, in evaluation mode. Raises ValueError where its context is
    shorter than `seqlen` or its logits are not finite.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and seqlen > positions:
        raise ValueError(f"windows of {seqlen} tokens are longer than the model's {positions} positions")
    device = model.get_input_embeddings().weight.device
    # A CPU generator, whatever the device: the draw depends on the probabilities and the seed alone.
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        batches = [
            _write(model, batch.to(device), seqlen, generator) for batch in first_N.split(_AT_ONCE)
        ]
    finally:
        model.train(was_training)
    return torch.cat(batches)


def _write(model: Any, first: torch.Tensor, seqlen: int, generator: torch.Generator) -> torch.Tensor:
    columns = [first.cpu()]
    cache = None
    for _ in range(seqlen - 1):
        token = columns[-1].to(first.device).unsqueeze(1)
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        if not torch.isfinite(logits).all():
            raise ValueError("the model's logits are not finite, so it cannot write its own calibration text")
        probabilities = torch.softmax(logits, dim=-1).cpu()
        columns.append(torch.multinomial(probabilities, 1, generator=generator).squeeze(1))
    return torch.stack(columns, dim=1)
