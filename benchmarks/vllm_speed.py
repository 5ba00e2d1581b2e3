"""Tokens per second of packed checkpoints in vLLM, against vLLM's own dense bfloat16.

    python benchmarks/vllm_speed.py DENSE PACKED … [--requests 1 4 16] [--json FILE]

It needs an environment with vLLM for CPUs; `make vllm-test` builds one in build/vllm/venv. Every
model has a process of its own, in which vLLM runs without further processes. The models take turns,
one generation each, so that other work on the machine slows all of them alike. A rate counts the
new tokens of all requests over the whole time, prompts included.

Two figures stand beside each other: wall time, and the time of the processor. The second one leaves
out the time in which other programs had the cores, so it is steadier on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def serve_rates(model: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Load a model, then answer each number of requests with wall and processor seconds."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="bfloat16",
        enforce_eager=options.eager,
        enable_prefix_caching=False,
        max_model_len=options.prompt_tokens + options.new_tokens,
        max_num_seqs=max(options.requests),
        kv_cache_memory_bytes=256 << 20,
    )
    sampling = SamplingParams(temperature=0, max_tokens=options.new_tokens, ignore_eos=True)
    pipe.send("ready")
    while requests := pipe.recv():
        # Other prompts for every request; the numbers are tokens of any vocabulary.
        prompts: list[Any] = [
            {"prompt_token_ids": [100 + 7 * i + 13 * n for i in range(options.prompt_tokens)]}
            for n in range(requests)
        ]
        wall, processor = time.perf_counter(), time.process_time()
        llm.generate(prompts, sampling, use_tqdm=False)
        pipe.send((time.perf_counter() - wall, time.process_time() - processor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="checkpoint folders; the first one is dense")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ |= {
        "OMP_NUM_THREADS": str(options.threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for model in options.models:
        pipes[model], theirs = spawn.Pipe()
        spawn.Process(target=serve_rates, args=(model, options, theirs), daemon=True).start()
        pipes[model].recv()

    def seconds(model: str, requests: int) -> tuple[float, float]:
        pipes[model].send(requests)
        answer: tuple[float, float] = pipes[model].recv()
        return answer

    found: dict[str, dict[int, list[tuple[float, float]]]] = {
        model: {requests: [] for requests in options.requests} for model in pipes
    }
    for requests in options.requests:
        for turn in range(options.rounds + 1):
            for model in pipes:
                took = seconds(model, requests)
                if turn:  # the first turn warms up
                    found[model][requests].append(took)
    dense = options.models[0]
    print(f"{'model':24} requests  tokens/s  of dense  of dense, processor time")
    for model, by_requests in found.items():
        for requests, times in by_requests.items():
            tokens = requests * options.new_tokens
            rate = statistics.median(tokens / wall for wall, _ in times)
            ratios = [
                statistics.median(
                    reference[place] / own[place]
                    for reference, own in zip(found[dense][requests], times, strict=True)
                )
                for place in (0, 1)
            ]
            print(
                f"{Path(model).name:24} {requests:8} {rate:9.1f} {ratios[0]:9.2f} {ratios[1]:9.2f}"
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    for pipe in pipes.values():
        pipe.send(0)


if __name__ == "__main__":
    main()
