"""Train a small Llama from random weights, as a checkpoint whose weights come from no quantiser.

    python benchmarks/small_llama.py OUT --data FOLDER [--tokens 2000000]

OUT becomes an ordinary checkpoint in bfloat16 of 33.6 million parameters: 8 blocks of width 512,
an untied head, and a byte-level tokenizer of 8,192 tokens that is trained on the same text. The
text is what FOLDER has of WikiText-2 and C4 for calibration, and the modules of Python's standard
library for calibration. Scores on the test text of WikiText-2 are printed on the way, after that of
a model that knows only how frequent each token is. The seed is fixed, but the bytes of the weights
depend on the processor and the number of threads.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from small_training import token_ids, train_checkpoint, train_tokenizer
from transformers import LlamaConfig

from prunus.calibration.corpora import load_corpus

VOCABULARY = 8192


def unigram_perplexity(ids: torch.Tensor, test: torch.Tensor) -> float:
    """Perplexity of the test text if every token is drawn by its frequency in the train text."""
    counts = torch.bincount(ids, minlength=VOCABULARY).double() + 1
    return math.exp(-(counts / counts.sum()).log()[test].mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    options = parser.parse_args()
    wikitext = load_corpus("wikitext2", "calibration", options.data)
    c4 = load_corpus("c4", "calibration", options.data)
    code = load_corpus("python-code", "calibration", options.data)
    texts = ["\n".join(wikitext.documents), *c4.documents, *code.documents]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    ids = token_ids(tokenizer, texts)
    test = token_ids(tokenizer, [load_corpus("wikitext2", "scoring", options.data).whole()])
    print(f"perplexity by frequencies alone: {unigram_perplexity(ids, test):.2f}", flush=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    training = {"tokens": options.tokens, "batch": 4, "seqlen": 512, "learning_rate": 1e-3}
    train_checkpoint(config, options.out, tokenizer, ids, test, **training)


if __name__ == "__main__":
    main()
