"""Train a small mixture of experts, as a checkpoint whose experts do different things.

    python benchmarks/small_moe.py OUT --data FOLDER [--tokens 12000000] [--layers 6]
        [--experts 32] [--top-k 4]

OUT becomes an ordinary checkpoint: a Qwen3-MoE of 11.7 million parameters, with 6 layers of 32
experts, of which each token chooses 4. Its tokenizer has 2,048 tokens and is trained on the same
text: the train texts of WikiText-2 and C4 in FOLDER. Scores on the test text of WikiText-2 are
printed on the way. Experts of random weights would not do different things.

`make results RESULTS=experts` removes its experts and measures what they are worth to it. There it
is the folder moe-32, and moe-16 one of `--experts 16 --top-k 2`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from small_training import token_ids, train_checkpoint, train_tokenizer
from transformers import Qwen3MoeConfig

from prunus.calibration.corpora import load_corpus

VOCABULARY = 2048
SEQLEN = 256


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
    wikitext = load_corpus("wikitext2", "calibration", options.data)
    c4 = load_corpus("c4", "calibration", options.data)
    texts = ["\n".join(wikitext.documents), *c4.documents]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    ids = token_ids(tokenizer, texts)
    test = token_ids(tokenizer, [load_corpus("wikitext2", "scoring", options.data).whole()])
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
