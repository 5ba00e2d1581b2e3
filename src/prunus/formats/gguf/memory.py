"""The memory of a model in llama.cpp: weights, KV cache and compute buffers.

    cache     2 · 2 bytes · KV heads · width of a head, for each token of the context and each block
    buffers   of 512 tokens, in float32: their logits and two hidden states, or in a block the
              products of the MLP and four hidden states, with a mask in float16 over the context

The cache is llama.cpp's default, in float16, for one conversation. It has a multiple of 256 tokens.
A block with a sliding window keeps the window and the 512 tokens that are computed together. The
buffers are those of flash attention, the default where a device has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.engine.linear_job import PruningJob
from prunus.engine.options import RunOptions
from prunus.engine.run import planned
from prunus.formats.base import format_for
from prunus.formats.gguf.format import GgufFormat
from prunus.formats.recipe import CompressionRecipe
from prunus.hardware.sizes import in_bytes
from prunus.options import at_least

# llama.cpp's `n_ubatch`, and what the number of tokens in a cache is a multiple of.
_TOKENS, _MULTIPLE = 512, 256


def cache_bytes(options: Mapping[str, Any], context: int) -> int:
    """Bytes of the KV cache.

    Args:
        options: The configuration of the model.
        context: Tokens of the context.

    >>> shape = {"num_hidden_layers": 30, "num_key_value_heads": 3, "head_dim": 64}
    >>> cache_bytes(shape, 8192) / 2**20  # SmolLM2-135M
    180.0
    """
    heads = options.get("num_key_value_heads") or options["num_attention_heads"]
    width = options.get("head_dim") or options["hidden_size"] // options["num_attention_heads"]
    tokens = [_rounded(context)] * options["num_hidden_layers"]
    # llama.cpp 2026 ignores the windows of Mistral and Phi 3, whose files do not use them.
    if options.get("model_type") == "gemma3_text":
        window = min(tokens[0], _rounded(options["sliding_window"] + _TOKENS))
        kinds = options["layer_types"]
        tokens = [window if kind == "sliding_attention" else tokens[0] for kind in kinds]
    return 2 * 2 * heads * width * sum(tokens)


def buffer_bytes(options: Mapping[str, Any], context: int) -> int:
    """Bytes of the compute buffers; arguments as for `cache_bytes`."""
    hidden, chosen = options["hidden_size"], options.get("num_experts_per_tok") or 1
    inner = (options.get("moe_intermediate_size") or options["intermediate_size"]) * chosen
    logits = options["vocab_size"] + 2 * hidden
    block = 3 * inner + 4 * hidden + _rounded(context) // 2
    return 4 * min(_TOKENS, _rounded(context)) * max(logits, block)


def plan_to_fit(
    model: str,
    output: Path | None,
    recipe: tuple[Path | None, dict[str, Any]],
    options: RunOptions,
    memory: int,
    context: int | None,
) -> tuple[PruningJob, dict[str, Any]]:
    """The plan of the largest GGUF file with which llama.cpp stays within a memory.

    Args:
        model: The model.
        output: The file; None leaves out the checks of it.
        recipe: The file with options and the options that were given, as `Options.read` takes them.
        options: The options of the run.
        memory: The bytes that weights, cache and buffers have.
        context: Tokens of the context; None for those that the model was trained for.

    Returns:
        The plan, and the bytes of each part by name. `room` is what cache and buffers leave, and
        `dense` is the file with the weights as the model stores them.

    Raises:
        ValueError: Cache and buffers alone are too large, not even the smallest types fit, or the
            output is no GGUF file.
        NotImplementedError: No GGUF file of this family can be written.
    """
    at_least(1, " token").check("context", context)
    # The largest type first: more bits than its are no use.
    file, given = recipe
    chosen = CompressionRecipe.read(file, given | {"type": "Q8_0"})
    stored = format_for(output or Path("out.gguf"), chosen)
    if not isinstance(stored, GgufFormat):
        raise ValueError(f"`fits` plans a GGUF file: give {output} a name that ends in .gguf")
    job = planned(stored, model, output, chosen, options)
    shape = job.checkpoint.config.get_text_config().to_dict()
    context = context or shape["max_position_embeddings"]
    needs = {"cache": cache_bytes(shape, context), "buffers": buffer_bytes(shape, context)}
    left = memory - sum(needs.values())
    too_small = (
        f"{in_bytes(memory)} do not hold this model with a context of {context:,} tokens: KV cache "
        f"and compute buffers take {in_bytes(memory - left)}, less with a shorter `context`"
    )
    if left <= 0:
        raise ValueError(too_small)
    needs |= {"room": left, "dense": stored.contents.file_bytes({})}
    if stored.file_bytes() > left:
        chosen = CompressionRecipe.read(file, given | {"size": left})
        try:
            job = planned(GgufFormat(chosen), model, output, chosen, options)
        except ValueError as fault:
            raise ValueError(f"{too_small}. For the rest, {fault}") from fault
    return job, needs | {"weights": job.format.file_bytes(), "context": context}


def _rounded(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE
