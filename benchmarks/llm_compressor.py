"""Weights of few bits by LLM Compressor, as a row of results.toml asks for them.

    python benchmarks/llm_compressor.py MODEL OUT gptq [--actorder none|static|group] [--bits 4]
    python benchmarks/llm_compressor.py MODEL OUT awq

It needs a virtual environment with llmcompressor and what prunus needs. It calibrates on the same
64 windows of 256 tokens of `mix` as prunus, and its groups are those of `prunus compress --bits 4`.
OUT is a folder in the format compressed-tensors, without the head, which is not rounded.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunus.calibration.sources import find_source
from prunus.calibration.windows import WindowRequest

SAMPLES, SEQLEN = 64, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("method", choices=("gptq", "awq"))
    parser.add_argument("--actorder", default="static", help="of GPTQ. Default: %(default)s")
    parser.add_argument("--bits", type=int, default=4, help="of a weight. Default: %(default)s")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    widths = (model.config.hidden_size, model.config.intermediate_size)
    weights = {"num_bits": options.bits, "type": "int", "symmetric": True, "strategy": "group"}
    weights["group_size"] = next(
        size for size in (128, 64, 32) if all(x % size == 0 for x in widths)
    )
    scheme: dict[str, Any] = {
        "ignore": ["lm_head"],
        "config_groups": {"linears": {"targets": ["Linear"], "weights": weights}},
    }
    if options.method == "gptq":
        order = None if options.actorder == "none" else options.actorder
        recipe = [GPTQModifier(**scheme, actorder=order)]
    else:
        recipe = [AWQModifier(), QuantizationModifier(**scheme)]
        if not torch.accelerator.is_available():
            # Its AWQ pins memory for a GPU, which fails where there is none.
            IntermediatesCache.pin_memory = lambda *_: None
    request = WindowRequest(samples=SAMPLES, seqlen=SEQLEN, tokenizer=lambda: tokenizer)
    ids = find_source("mix").draw(request).ids.tolist()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * SEQLEN] * SAMPLES}),
        recipe=recipe,
        max_seq_length=SEQLEN,
        num_calibration_samples=SAMPLES,
        output_dir=options.out,
    )


if __name__ == "__main__":
    main()
