"""What a request may ask for: checked before any work.

transformers' handlers do not check some options and ignore others without a word. Here every
option is within limits, or it is refused with a sentence.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from prunus.serving.errors import RequestError

#: OpenAI takes four stop sequences. Long ones would only cost time for every token.
_MAX_STOPS, _MAX_STOP_LENGTH = 4, 256
_MAX_BIASES = 300

#: Option that would change the answer, and that this server does not have -> its values without
#: any effect.
_NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "generation_config": (None,),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "auto"),
    "top_logprobs": (None, 0),
    "web_search_options": (None,),
}

#: Variables of a chat template that the server sets, or that choose how it is applied.
_RESERVED = {
    "add_generation_prompt",
    "answer_follows",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "processor_kwargs",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "template",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}

_Count = Annotated[int, Field(ge=1, lt=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Options(_Strict):
    """Options that chats and completions share; see OpenAI's API for their meaning."""

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: _Count | None = None
    stop: str | list[str] | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        given = [value] if isinstance(value, str) else value or []
        if len(given) > _MAX_STOPS or not all(0 < len(x) <= _MAX_STOP_LENGTH for x in given):
            raise ValueError(
                f"give at most {_MAX_STOPS} sequences of 1 to {_MAX_STOP_LENGTH} characters"
            )
        return value

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        """The stop sequences, also where a single one was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class _Part(_Strict):
    type: Literal["text"]
    text: str


class _Message(_Strict):
    role: str
    content: str | list[_Part] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _check_parts(cls, value: Any) -> Any:
        for part in value if isinstance(value, list) else ():
            if isinstance(part, dict) and part.get("type") != "text":
                raise ValueError(
                    f"a part of type {str(part.get('type'))[:40]!r} cannot be read; this model "
                    "takes text only"
                )
        return value


class ChatOptions(Options):
    """A request to `/v1/chat/completions`."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: _Count | None = None
    logit_bias: dict[str, float] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token, bias in (value or {}).items():
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                raise ValueError(f"{token[:40]!r} is no token id")
            if not math.isfinite(bias) or abs(bias) > 100:
                raise ValueError(f"the bias of token {token} must be between -100 and 100")
        if len(value or {}) > _MAX_BIASES:
            raise ValueError(f"give at most {_MAX_BIASES} tokens")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_variables(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if reserved := sorted(_RESERVED & set(value or {})):
            raise ValueError(f"a request may not set {', '.join(reserved)}")
        return value


class CompletionOptions(Options):
    """A request to `/v1/completions`."""

    prompt: str


_Kind = TypeVar("_Kind", bound=Options)


def parse_options(kind: type[_Kind], body: dict[str, Any]) -> _Kind:
    """Read and check the options of a request."""
    for name, neutral in _NOT_SUPPORTED.items():
        if body.get(name) not in neutral:
            raise RequestError(
                400, f"{name} is not supported by this server; leave it out", param=name
            )
    try:
        return kind.model_validate(body)
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise RequestError(400, f"{place}: {reason}", param=place) from fault
