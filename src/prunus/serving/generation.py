"""Generation in threads that end when their client is gone.

transformers' own manager runs `model.generate` in one thread. Here several requests can be computed
at once, a request without a client ends at its next token whether it streams or not, and stop
sequences are found in the text, which is cut before them.
"""

from __future__ import annotations

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    DirectStreamer,
    GenerationState,
    ReasoningText,
    _GenerationCancelled,
    _StreamError,
    build_response_parser,
)

from prunus.serving.errors import RequestError
from prunus.serving.job import current_job
from prunus.serving.stop_text import StopText, cut_at_stop


class ThreadedGeneration(GenerationState):
    """The state that transformers' handlers share, with one manager for the only model.

    Args:
        context: largest number of tokens of prompt and answer together; None for no limit.
    """

    def __init__(self, max_concurrent: int, context: int | None) -> None:
        super().__init__()
        self._manager = _Manager(max_concurrent, context)

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        """The manager, whatever the model is called."""
        return self._manager

    def shutdown(self) -> None:
        """Wait for the threads to end."""
        self._manager.stop()


class _Manager(BaseGenerateManager):
    """`model.generate` in a pool of threads."""

    def __init__(self, max_concurrent: int, context: int | None) -> None:
        self._threads = ThreadPoolExecutor(max_concurrent, "prunus-generate")
        self._context = context

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], DirectStreamer]:
        """Start to generate; see the base class."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._fit_into_context(inputs, gen_config)
        streamer = _Streamer(processor, queue, response_parser)

        def run() -> None:
            try:
                _generate(model, inputs, gen_config, streamer)
            except _GenerationCancelled:
                streamer.give(None)
            except Exception as fault:
                streamer.give(_StreamError(_escaped(_report(fault))))

        self._threads.submit(run)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, torch.Tensor]:
        """Generate to the end; see the base class."""
        job = current_job()
        self._fit_into_context(inputs, gen_config)
        # Stop sequences count in the content only, which a parser tells from the model's thoughts.
        parser = build_response_parser(processor, model, inputs["input_ids"]) if job.stop else None
        streamer = _Streamer(processor, asyncio.Queue(), parser)
        work = partial(_generate, model, inputs, gen_config, streamer)
        try:
            sequences = await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except _GenerationCancelled as fault:
            raise RequestError(499, "the client went away") from fault
        except Exception as fault:
            raise RequestError(500, _report(fault)) from fault
        prompt_tokens = inputs["input_ids"].shape[-1]
        ids = sequences[0, prompt_tokens:]
        text = processor.decode(ids, skip_special_tokens=True)
        return cut_at_stop(text, job.stop), prompt_tokens, ids

    def stop(self) -> None:
        """Wait for the threads to end."""
        self._threads.shutdown(cancel_futures=True)

    def _fit_into_context(self, inputs: Any, gen_config: Any) -> None:
        """Refuse a prompt that leaves no room for an answer, and limit the answer to the room."""
        tokens = inputs["input_ids"].shape[-1]
        if not tokens:
            raise RequestError(400, "the prompt is empty; give some text", param="prompt")
        if self._context is None:
            return
        if tokens >= self._context:
            raise RequestError(
                400,
                f"the prompt has {tokens} tokens, and prompt and answer together may have "
                f"{self._context}; shorten it",
                code="context_length_exceeded",
                param="messages",
            )
        gen_config.max_new_tokens = min(gen_config.max_new_tokens, self._context - tokens)


class _Streamer(DirectStreamer):
    """Passes on the text of the current request up to the first stop sequence, until its client is
    gone.
    """

    def __init__(self, processor: Any, queue: asyncio.Queue[Any], response_parser: Any) -> None:
        self.job, loop = current_job(), asyncio.get_running_loop()
        tokenizer = processor.tokenizer._tokenizer
        super().__init__(tokenizer, loop, queue, response_parser=response_parser)
        # `put`, which `generate` calls for every token, raises once this is set.
        self._cancelled = self.job.cancelled
        self._text = StopText(self.job.stop)

    def stopped(self, *_: Any, **__: Any) -> bool:
        """Whether a stop sequence has come: a criterion of `generate`."""
        return self._text.found

    def give(self, item: Any) -> None:
        """Put an item into the queue of the event loop, unless that has ended."""
        if not self._loop.is_closed():
            super()._enqueue(item)

    def _enqueue(self, item: Any) -> None:
        if isinstance(item, str) and not isinstance(item, ReasoningText):
            item = self._text.add(item)
        elif rest := self._text.rest():
            self.give(rest)
        if item != "":
            self.give(item)


def _generate(model: Any, inputs: Any, gen_config: Any, streamer: _Streamer) -> torch.Tensor:
    job = streamer.job
    if job.cancelled.is_set():
        raise _GenerationCancelled
    if job.seed is not None:
        torch.manual_seed(job.seed)
    sequences: torch.Tensor = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        streamer=streamer,
        generation_config=gen_config,
        stopping_criteria=StoppingCriteriaList([streamer.stopped]),
    )
    return sequences


def _report(fault: Exception) -> str:
    """Log a failure of the model, and return what the client is told of it."""
    reason = " ".join(str(fault).split())[:300]
    print(f"prunus: generation failed: {type(fault).__name__}: {reason}", file=sys.stderr)
    return f"the model failed ({type(fault).__name__}); the server's log says more"


def _escaped(message: str) -> str:
    """A message for transformers' handlers, which put it between quotation marks as it is."""
    return json.dumps(message)[1:-1]
