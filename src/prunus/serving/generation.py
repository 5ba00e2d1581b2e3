"""Generation in threads that end when their client is gone.

transformers parses what models write: reasoning, calls of tools and text. Here several requests can
be computed at once, a request without a client ends at its next token, and stop sequences are found
in the text, which is cut before them. At the end are the forms of answers in OpenAI's protocol.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from transformers import StoppingCriteriaList
from transformers.cli.serving.utils import (
    DirectStreamer,
    ReasoningText,
    ToolCall,
    _GenerationCancelled,
    build_response_parser,
)

from prunus.evaluation.generation import chosen_settings
from prunus.hardware.errors import reason
from prunus.serving.gate import Job, RequestError, client_gone
from prunus.serving.reader import Limits, PromptReader
from prunus.serving.requests import DEFAULT_TOKENS, Work

_Json = dict[str, Any]

_log = logging.getLogger("prunus.serving")

#: Most logits at once when tokens are scored: half a GiB of float32.
_LOGITS = 2**27


@dataclass(frozen=True)
class End:
    """The end of an answer; `logprobs` as OpenAI writes them, where the request asks for them."""

    reason: Literal["stop", "length", "tool_calls"]
    tokens: int
    logprobs: dict[str, list[Any]] | None = None


class Generator:
    """Generates answers with one model, at most `max_concurrent` at once."""

    def __init__(
        self, model: Any, tokenizer: Any, context: int | None, max_concurrent: int
    ) -> None:
        self._model, self._tokenizer, self._context = model, tokenizer, context
        self._threads = ThreadPoolExecutor(max_concurrent, "prunus-generate")

    async def items(self, job: Job, work: Work, prompt: list[int]) -> AsyncIterator[Any]:
        """Yield the pieces of an answer, text, `ReasoningText` or `ToolCall`, and then its end."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def give(item: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def run() -> None:
            try:
                give(self._generate(job, work, prompt, (loop, queue)))
            except _GenerationCancelled:
                give(client_gone())
            except Exception as fault:
                _log.error("generation failed: %s", reason(fault))
                told = f"the model failed ({type(fault).__name__}); the server's log says more"
                give(RequestError(500, told))

        self._threads.submit(run)
        while True:
            item = await queue.get()
            if isinstance(item, RequestError):
                raise item
            yield item
            if isinstance(item, End):
                return

    def shutdown(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _generate(self, job: Job, work: Work, prompt: list[int], output: tuple[Any, Any]) -> End:
        settings = self._settings(work, len(prompt))
        parser = None
        if work.is_chat:
            parser = build_response_parser(self._tokenizer, self._model, prompt, work.tools)
        streamer = _Streamer(self._tokenizer, job, work, parser, *output)
        ids = torch.tensor([prompt], device=self._model.device)
        if settings.max_new_tokens:
            streamer.check()
            if work.seed is not None:
                torch.manual_seed(work.seed)
            ids = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=streamer,
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([streamer.stopped]),
            )
        logprobs = None
        if work.logprobs is not None:
            first = 0 if work.echo else len(prompt)
            logprobs = self._score(ids[0], first, work.logprobs, streamer.check)
        return End(streamer.reason(settings.max_new_tokens), streamer.total_tokens, logprobs)

    def _settings(self, work: Work, prompt_tokens: int) -> Any:
        """The checkpoint's settings with those of the request in their place."""
        found = chosen_settings(self._model.generation_config, work)
        found.max_new_tokens = DEFAULT_TOKENS if work.max_tokens is None else work.max_tokens
        if self._context is not None:
            found.max_new_tokens = min(found.max_new_tokens, self._context - prompt_tokens)
        if work.logit_bias:
            found.sequence_bias = {(token,): bias for token, bias in work.logit_bias.items()}
        return found

    @torch.no_grad()
    def _score(
        self, ids: torch.Tensor, first: int, top: int, check: Callable[[], None]
    ) -> dict[str, list[Any]]:
        """The log-probability of each token from `first` on, and of the `top` likeliest tokens in
        its place; none for the first token of all, which nothing predicts.
        """
        texts = [self._tokenizer.decode([token]) for token in ids[first:].tolist()]
        chances: list[float | None] = [None] * (first == 0)
        likeliest: list[dict[str, float] | None] = [None] * (first == 0)
        offsets = [0, *accumulate(map(len, texts))]
        rows = max(1, _LOGITS // self._model.get_input_embeddings().num_embeddings)
        for begin in range(max(first, 1), len(ids), rows):
            check()
            end = min(begin + rows, len(ids))
            # The last row predicts token `end` - 1. What comes before is computed again for each
            # slice, because not every model can go on from a cache with many tokens at once.
            keep = {"logits_to_keep": end - begin} if self._model._supports_logits_to_keep() else {}
            logits = self._model(input_ids=ids[None, : end - 1], use_cache=False, **keep).logits
            scores = logits[0, begin - end :].float().log_softmax(-1).clamp(min=-9999.0)
            own = scores.gather(1, ids[begin:end, None])[:, 0].tolist()
            best = scores.topk(top)
            for place, chance in enumerate(own):
                chances.append(chance)
                # Several tokens may have the same text; the likeliest of them counts.
                named: dict[str, float] = {}
                pairs = zip(best.indices[place].tolist(), best.values[place].tolist(), strict=True)
                for token, value in pairs:
                    named.setdefault(self._tokenizer.decode([token]), value)
                named.setdefault(texts[begin + place - first], chance)
                likeliest.append(named)
        return {
            "tokens": texts,
            "token_logprobs": chances,
            "top_logprobs": likeliest,
            "text_offset": offsets[:-1],
        }


class _Streamer(DirectStreamer):
    """Passes on what is generated up to the first stop sequence, until the client is gone."""

    def __init__(
        self, tokenizer: Any, job: Job, work: Work, parser: Any, loop: Any, queue: Any
    ) -> None:
        self._text, self._calls_tools = StopText(work.stop or ()), False
        super().__init__(tokenizer._tokenizer, loop, queue, response_parser=parser)
        # `put`, which `generate` calls for every token, raises once this is set.
        self._cancelled = job.cancelled

    def check(self) -> None:
        """Raise if the client is gone, or the server."""
        if self._cancelled.is_set() or self._loop.is_closed():
            raise _GenerationCancelled

    def stopped(self, *_: Any, **__: Any) -> bool:
        """Whether a stop sequence was met: a criterion of `generate`."""
        return self._text.found

    def reason(self, limit: int) -> Literal["stop", "length", "tool_calls"]:
        if self._calls_tools:
            return "tool_calls"
        return "length" if not self._text.found and self.total_tokens >= limit else "stop"

    def _enqueue(self, item: Any) -> None:
        """Take a piece of text, of reasoning, a call of a tool, or None at the end."""
        self.check()
        is_text = isinstance(item, str) and not isinstance(item, ReasoningText)
        content = self._text.add(item) if is_text else self._text.rest()
        if content:
            super()._enqueue(content)
        if item is not None and not is_text:
            self._calls_tools |= isinstance(item, ToolCall)
            super()._enqueue(item)


class StopText:
    """Shows a text, piece by piece, up to the first stop sequence.

    The end of a piece may be the beginning of a stop sequence. It is held back until the next
    pieces tell. From the first stop sequence on, `found` is true, and nothing is shown.

    >>> text = StopText(["END"])
    >>> [text.add(piece) for piece in ("one E", "N two EN", "D three")], text.found
    (['one ', 'EN two ', ''], True)
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The text that can be shown after one more piece."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.found = bool(ends)
        shown = min(ends) if ends else len(text) - self._length_of_beginning(text)
        self._held = "" if ends else text[shown:]
        return text[:shown]

    def rest(self) -> str:
        """The text that was held back, for a text that ends here."""
        held, self._held = self._held, ""
        return held

    def _length_of_beginning(self, text: str) -> int:
        """Length of the longest end of a text with which a stop sequence begins."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:length])
            ),
            default=0,
        )


# --- answers, whole and in pieces ---


class Answers:
    def __init__(self, reader: PromptReader, limits: Limits, generator: Generator) -> None:
        self._reader, self._limits, self._generator = reader, limits, generator

    async def answer(self, path: str, job: Job) -> _Json | AsyncIterator[str]:
        """The answer to a request to the endpoint `path`, or the events of a stream."""
        work = await self._reader.read(path, self._limits, job.body)
        job.prompt_tokens = sum(map(len, work.prompts))
        kind = "chat.completion" if work.is_chat else "text_completion"
        if work.is_chat and work.stream:
            kind += ".chunk"
        head = {"object": kind, "created": int(time.time()), "model": self._limits.name}
        events = self._events(job, work, {"id": job.id, **head})
        if work.stream:
            return _stream(events)
        choices: list[_Json] = []
        async for event in events:
            [piece] = event["choices"]
            if piece["index"] == len(choices):
                choices.append(piece)
            else:
                _add(choices[-1], piece)
        for choice in choices:
            if work.is_chat:
                choice["message"] = {"content": "", **choice.pop("delta")}
        return event | {"choices": choices}

    async def _events(self, job: Job, work: Work, head: _Json) -> AsyncIterator[_Json]:
        """Yield an answer in pieces; the last one says how many tokens there were."""
        for index, prompt in enumerate(work.prompts):
            calls = 0
            choice: _Json = {"index": index, "finish_reason": None, "logprobs": None}
            if work.is_chat:
                yield {**head, "choices": [choice | {"delta": {"role": "assistant"}}]}
            else:
                text = work.texts[index] if work.texts else ""
                yield {**head, "choices": [choice | {"text": text}]}
            async for item in self._generator.items(job, work, prompt):
                found = dict(head)
                piece: _Json = {**choice, **({"delta": {}} if work.is_chat else {"text": ""})}
                if isinstance(item, End):
                    job.answer_tokens += item.tokens
                    piece |= {"finish_reason": item.reason, "logprobs": item.logprobs}
                    if index == len(work.prompts) - 1:
                        found["usage"] = job.usage()
                elif not work.is_chat:
                    piece["text"] = item
                elif isinstance(item, ToolCall):
                    piece["delta"] = {"tool_calls": [_tool_call(item, job.id, calls)]}
                    calls += 1
                else:
                    name = "reasoning_content" if isinstance(item, ReasoningText) else "content"
                    piece["delta"] = {name: item}
                yield {**found, "choices": [piece]}


def _tool_call(call: ToolCall, request: str, index: int) -> _Json:
    return {
        "index": index,
        "id": f"{request}_tool_call_{index}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _add(whole: _Json, piece: _Json) -> None:
    """Join a piece to what came before it: texts and lists grow, other values replace."""
    for name, value in piece.items():
        if isinstance(value, dict) and isinstance(whole.get(name), dict):
            _add(whole[name], value)
        elif isinstance(value, list) or name in ("text", "content", "reasoning_content"):
            whole[name] = whole.get(name, type(value)()) + value
        else:
            whole[name] = value


async def _stream(events: AsyncIterator[_Json]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"
    except RequestError as fault:
        yield f"data: {fault.body()}\n\n"
