"""Answers in the forms of OpenAI's protocol: chats and texts, whole and in pieces."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from transformers.cli.serving.utils import ReasoningText, ToolCall

from prunus.serving.errors import RequestError
from prunus.serving.gate import Job
from prunus.serving.generation import End, Generator
from prunus.serving.reader import Limits, PromptReader
from prunus.serving.requests import Work

_Json = dict[str, Any]


class Answers:
    """Answers requests with one model."""

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
