"""Greedy tokens of a checkpoint in vLLM, as JSON on the last line of the output.

    python vllm_tokens.py FOLDER '[[5, 6], [7]]' COUNT

prunus is not imported here: vLLM runs these files alone.
"""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    llm = LLM(
        folder,
        dtype="float16" if "float16" in sys.argv else "float32",
        enforce_eager="compiled" not in sys.argv,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=len(prompts),
        kv_cache_memory_bytes=64 << 20,
    )
    answers = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    print(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))


if __name__ == "__main__":
    main()
