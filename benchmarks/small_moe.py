"""Train a small mixture of experts, and measure what its experts are worth to it.

    python benchmarks/small_moe.py OUT --data FOLDER [--tokens 12000000] [--layers 6]
        [--experts 32] [--top-k 4]

OUT becomes an ordinary checkpoint: a Qwen3-MoE of 11.7 million parameters, with 6 layers of 32
experts, of which each token chooses 4. Its tokenizer has 2,048 tokens and is trained on the same
text: the train texts of WikiText-2 and C4 in FOLDER. Scores on the test text of WikiText-2 are
printed on the way. Training gives a model whose experts do different things, which random weights
would not. A model that is there already is not trained again.

Then a quarter and a half of the experts are removed, by REAP and by contribution, each with repair
and without it. A table says how far each result is from the trained model on the
test texts of WikiText-2 and C4.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small_training import token_ids, train_checkpoint, train_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

import prunus
from prunus.calibration.corpora import load_corpus

VOCABULARY = 2048
SEQLEN = 256


#: Calibration windows, and test windows that are scored.
SAMPLES, SCORED = 64, 64
#: Row of the table -> options of `prunus.shrink`.
ROWS: dict[str, dict[str, Any]] = {
    "REAP": {"saliency": "reap", "repair": False},
    "contribution": {"saliency": "contribution", "repair": False},
    "REAP and repair": {"saliency": "reap", "repair": True},
    "contribution and repair": {"saliency": "contribution", "repair": True},
}


def print_table(folder: Path, ids: torch.Tensor, tests: dict[str, Path]) -> None:
    """Remove experts in several ways and print what is left.

    Args:
        folder: of the trained model.
        ids: the train text, as one row of token ids.
        tests: name of a text -> a file with its windows.
    """
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(len(ids) - SEQLEN, (SAMPLES,), generator=generator)
    windows = torch.stack([ids[start : start + SEQLEN] for start in starts.tolist()])
    how: dict[str, Any] = {"seqlen": SEQLEN, "dtype": "float32", "progress": False}
    for name, test in tests.items():
        dense = prunus.perplexity(folder, str(test), **how).perplexity
        print(f"dense: perplexity {dense:.2f} on {name}")
    columns = [cell for name in tests for cell in (f"KL, {name}", "perplexity")]
    print(f"\n| experts that go | by | {' | '.join(columns)} | seconds |")
    print(f"| ---: | --- | {'---: | ' * len(columns)}---: |", flush=True)
    for share in (0.25, 0.5):
        for name, options in ROWS.items():
            started, cells = time.process_time(), []
            with tempfile.TemporaryDirectory() as place:
                out = Path(place, "out")
                prunus.shrink(folder, out, experts=share, calibration=windows, **options)
                seconds = time.process_time() - started
                for test in tests.values():
                    found = prunus.perplexity(out, str(test), reference=folder, **how)
                    assert found.divergence is not None
                    cells.append(f"{found.divergence.kl:.4f} | {found.perplexity:.2f}")
            print(f"| {share:.0%} | {name} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=12_000_000)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    options = parser.parse_args()
    wikitext, c4, wikitext_test, c4_test = (
        load_corpus(name, part, options.data)
        for part in ("calibration", "scoring")
        for name in ("wikitext2", "c4")
    )
    texts = ["\n".join(wikitext.documents), *c4.documents]
    trained = (options.out / "config.json").exists()
    tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(options.out)
        if trained
        else train_tokenizer(texts, VOCABULARY)
    )
    ids = token_ids(tokenizer, texts)
    tests = {
        "WikiText-2": token_ids(tokenizer, [wikitext_test.whole()]),
        "C4": token_ids(tokenizer, [c4_test.whole()]),
    }
    if not trained:
        train_experts(options, tokenizer, ids, tests["WikiText-2"])
    files = {name: options.out / f"{name}.safetensors" for name in tests}
    for name, test in tests.items():
        windows = test[: SCORED * SEQLEN].view(SCORED, SEQLEN)
        save_file({"input_ids": windows.clone()}, files[name])
    print_table(options.out, ids, files)


def train_experts(
    options: argparse.Namespace, tokenizer: Any, ids: torch.Tensor, test: torch.Tensor
) -> None:
    """Train a mixture of experts from random weights and save it."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        moe_intermediate_size=96,
        num_hidden_layers=options.layers,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        norm_topk_prob=True,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=4 * SEQLEN,
        tie_word_embeddings=True,
        # The auxiliary loss, which spreads tokens over the experts, is part of the loss.
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    training = {"tokens": options.tokens, "batch": 24, "seqlen": SEQLEN, "learning_rate": 2e-3}
    train_checkpoint(config, options.out, tokenizer, ids, test, **training)


if __name__ == "__main__":
    main()
