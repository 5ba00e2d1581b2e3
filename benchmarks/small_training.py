"""Train a small model from random weights on the texts at hand, for scripts that need one.

The weights of such a model are no quantiser's output, unlike those of any model that a package
registry carries. So a format of few bits cannot find old levels again. The scripts small_llama.py
and small_moe.py choose the architecture.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

__all__ = ["perplexity", "token_ids", "train_checkpoint", "train_tokenizer"]

END = "<|endoftext|>"
WARM_UP_STEPS = 50


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with so many tokens, which splits words as GPT-2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, model_max_length=10**9
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token ids, (tokens,) int64, each text followed by the end token."""
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    return torch.tensor([token for row in rows for token in row])


def perplexity(model: torch.nn.Module, ids: torch.Tensor, seqlen: int, windows: int = 16) -> float:
    """Perplexity over the first windows of a text."""
    batch = ids[: windows * seqlen].view(windows, seqlen)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        losses = [model(part, labels=part).loss.item() for part in batch.split(8)]
    return math.exp(sum(losses) / len(losses))


def train(
    model: torch.nn.Module,
    ids: torch.Tensor,
    test: torch.Tensor,
    *,
    tokens: int,
    batch: int,
    seqlen: int,
    learning_rate: float,
) -> None:
    """Train by AdamW in bfloat16, with the learning rate of a cosine; print 20 scores on the way.

    Args:
        model: with random weights in float32; trained in place.
        ids: the train text, (tokens,) int64. Windows start anywhere.
        test: the text to score, (tokens,) int64.
        tokens: number of tokens to train on. A token that comes twice counts twice.
        batch: windows in a step.
        seqlen: tokens in a window.
        learning_rate: the highest one.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    generator = torch.Generator().manual_seed(0)
    started, shown, steps = time.perf_counter(), -1, max(1, tokens // (batch * seqlen))
    for step in range(steps):
        share = step / steps
        rate = learning_rate * min(1, (step + 1) / WARM_UP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)
        starts = torch.randint(len(ids) - seqlen, (batch,), generator=generator)
        window = torch.stack([ids[start : start + seqlen] for start in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(window, labels=window).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if int(20 * share) > shown:
            shown = int(20 * share)
            score = perplexity(model.eval(), test, seqlen)
            model.train()
            print(
                f"{share:4.0%}, {(step + 1) * batch * seqlen:,} tokens in "
                f"{time.perf_counter() - started:.0f} s: loss {loss.item():.3f}, test perplexity "
                f"{score:.2f}",
                flush=True,
            )


def train_checkpoint(
    config: PreTrainedConfig,
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
    ids: torch.Tensor,
    test: torch.Tensor,
    **training: Any,
) -> None:
    """Train a model from random weights (seed 0) and save it to `out`, in bfloat16.

    The arguments are those of `train`.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    if hasattr(config, "num_experts"):
        model.set_experts_implementation("grouped_mm")
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters, {len(ids):,} tokens of train text", flush=True)
    train(model, ids, test, **training)
    if hasattr(config, "output_router_logits"):
        model.config.output_router_logits = False  # of training alone
    model.eval().bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"test perplexity {perplexity(model, test, training['seqlen']):.2f}; saved to {out}")
