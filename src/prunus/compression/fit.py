"""The largest GGUF file with which llama.cpp stays within a memory: `plan --fits`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunus.compression.compress import Compression
from prunus.engine.command import run_verb
from prunus.engine.linear_plan import LinearPlan
from prunus.engine.run_options import RunOptions
from prunus.formats.codec import codec_for
from prunus.formats.gguf.codec import GgufCodec, GgufPlan
from prunus.formats.gguf.context_memory import buffer_bytes, cache_bytes
from prunus.options import at_least
from prunus.rounding.compression_recipe import CompressionRecipe
from prunus.rounding.size_plan import size_plan_of
from prunus.words import in_bytes


def plan_to_fit(
    model: str,
    output: Path | None,
    recipe: tuple[Path | None, dict[str, Any]],
    options: RunOptions,
    memory: int,
    context: int | None,
) -> tuple[LinearPlan, dict[str, Any]]:
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
    if output is not None and codec_for(output, chosen) is not GgufCodec:
        raise ValueError(f"`fits` plans a GGUF file: give {output} a name that ends in .gguf")

    def planned_file(recipe: CompressionRecipe) -> LinearPlan:
        command = Compression(model, output, recipe, options, GgufCodec)
        plan: LinearPlan = run_verb(command, plan_only=True)
        return plan

    plan = planned_file(chosen)
    shape = plan.checkpoint.config.get_text_config().to_dict()
    context = context or shape["max_position_embeddings"]
    needs = {"cache": cache_bytes(shape, context), "buffers": buffer_bytes(shape, context)}
    left = memory - sum(needs.values())
    too_small = (
        f"{in_bytes(memory)} do not hold this model with a context of {context:,} tokens: KV cache "
        f"and compute buffers take {in_bytes(memory - left)}, less with a shorter `context`"
    )
    if left <= 0:
        raise ValueError(too_small)
    size_plan = size_plan_of(plan)
    assert isinstance(size_plan, GgufPlan)
    needs |= {"room": left, "dense": size_plan.contents.file_bytes({})}
    if size_plan.file_bytes() > left:
        chosen = CompressionRecipe.read(file, given | {"size": left})
        try:
            plan = planned_file(chosen)
        except ValueError as fault:
            raise ValueError(f"{too_small}. For the rest, {fault}") from fault
    return plan, needs | {"weights": plan.storage.file_bytes(), "context": context}
