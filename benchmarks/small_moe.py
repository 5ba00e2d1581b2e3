"""Train a small mixture of experts, so that pruning experts can be measured on a real one.

    python benchmarks/small_moe.py OUT --data FOLDER [--minutes 60] [--experts 32] [--top-k 4]

OUT becomes an ordinary checkpoint: a Qwen3-MoE of 11.7 million parameters, with 6 layers of 32
experts, of which each token chooses 4. Its tokenizer has 2,048 tokens and is trained on the same
text: the train texts of WikiText-2 and C4 in FOLDER. Scores on the test text of WikiText-2 are
printed on the way. An hour on two cores gives a model whose experts do different things, which
random weights would not.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

from prunus.calibration.corpora import load_corpus

VOCABULARY, END = 2048, "<|endoftext|>"
SEQLEN, BATCH = 256, 24
LEARNING_RATE, WARM_UP_STEPS = 2e-3, 50


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a small vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, model_max_length=10**9
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token ids, each followed by the end token."""
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    return torch.tensor([token for each in ids for token in each])


def perplexity(model: torch.nn.Module, ids: torch.Tensor, windows: int = 64) -> float:
    """Perplexity over the first windows of a text."""
    batch = ids[: windows * SEQLEN].view(windows, SEQLEN)
    with torch.no_grad():
        losses = [model(each, labels=each).loss.item() for each in batch.split(8)]
    return math.exp(sum(losses) / len(losses))


def train(model: torch.nn.Module, ids: torch.Tensor, test: torch.Tensor, minutes: float) -> None:
    """Train by AdamW for a time, with the learning rate of a cosine over that time."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    generator = torch.Generator().manual_seed(0)
    started, step, shown = time.perf_counter(), 0, -1
    while (share := (time.perf_counter() - started) / (60 * minutes)) < 1:
        rate = LEARNING_RATE * min(1, (step + 1) / WARM_UP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)
        starts = torch.randint(len(ids) - SEQLEN, (BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + SEQLEN] for start in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            # The auxiliary loss, which spreads tokens over the experts, is part of this loss.
            loss = model(batch, labels=batch, output_router_logits=True).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if int(20 * share) > shown:
            shown = int(20 * share)
            score = perplexity(model.eval(), test)
            model.train()
            print(
                f"{share:4.0%}, step {step}, {step * BATCH * SEQLEN:,} tokens: loss "
                f"{loss.item():.3f}, test perplexity {score:.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    options = parser.parse_args()
    wikitext, c4, test_text = (
        load_corpus(name, part, options.data)
        for name, part in (
            ("wikitext2", "calibration"),
            ("c4", "calibration"),
            ("wikitext2", "scoring"),
        )
    )
    texts = ["\n".join(wikitext.documents), *c4.documents]
    tokenizer = train_tokenizer(texts)
    ids, test = token_ids(tokenizer, texts), token_ids(tokenizer, [test_text.text()])
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        moe_intermediate_size=96,
        num_hidden_layers=6,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        norm_topk_prob=True,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=4 * SEQLEN,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    model.set_experts_implementation("grouped_mm")
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters, {len(ids):,} tokens of train text", flush=True)
    train(model, ids, test, options.minutes)
    model.eval().bfloat16().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"test perplexity {perplexity(model, test):.2f}; saved to {options.out}")


if __name__ == "__main__":
    main()
