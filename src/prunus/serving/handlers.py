"""transformers' handlers for chats and completions, with OpenAI's rules."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler

from prunus.serving.errors import RequestError
from prunus.serving.job import current_job
from prunus.serving.request_options import ChatOptions, CompletionOptions, Options, parse_options
from prunus.serving.served_model import unknown_model
from prunus.serving.stop_text import cut_at_stop


class _OneModelHandler:
    """What both handlers do differently from transformers."""

    _options: type[Options]
    model_manager: Any

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request; what cannot be read of it is an error of the client."""
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc]
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            reason = " ".join(str(fault).split())[:300]
            raise RequestError(400, f"the request cannot be read: {reason}") from fault

    def _validate_request(self, body: dict[str, Any]) -> None:
        options = parse_options(self._options, body)
        job = current_job()
        # Both take effect in the thread that generates.
        job.stop, job.seed = options.stop_sequences, options.seed
        for name in ("stop", "seed"):
            body.pop(name, None)
        super()._validate_request(body)  # type: ignore[misc]

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        served = self.model_manager.force_model
        requested = body.get("model")
        if requested is not None and requested != served:
            raise unknown_model(requested, served)
        return (served, *self.model_manager.load_model_and_processor(served))

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        """As in transformers; a temperature or `top_p` turns sampling on, and 0 turns it off."""
        settings = super()._build_generation_config(  # type: ignore[misc]
            body, model_generation_config, use_cb=use_cb
        )
        temperature = body.get("temperature")
        if temperature == 0:
            settings.do_sample = False
        elif temperature is not None or body.get("top_p") is not None:
            settings.do_sample = True
        if not settings.do_sample:
            # Settings of sampling have no effect now, and transformers warns of them.
            for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
                setattr(settings, name, None)
        return settings

    def _streaming(self, *arguments: Any, **options: Any) -> Any:
        response = super()._streaming(*arguments, **options)  # type: ignore[misc]
        response.body_iterator = _with_end(response.body_iterator)
        return response


class ChatHandler(_OneModelHandler, ChatCompletionHandler):
    """Answers `/v1/chat/completions`."""

    _options = ChatOptions

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        for message in body["messages"]:
            if message["role"] == "developer":  # OpenAI's newer name, which no template knows
                message["role"] = "system"
        if body.get("chat_template_kwargs") is None:
            body.pop("chat_template_kwargs", None)

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        _, model, _ = self._resolve_model(body)
        vocabulary = model.get_input_embeddings().num_embeddings
        for token in body.get("logit_bias") or {}:
            if int(token) >= vocabulary:
                reason = f"logit_bias: token {token} is outside the vocabulary of {vocabulary}"
                raise RequestError(400, reason, param="logit_bias")
        if not body.get("logit_bias"):
            body.pop("logit_bias", None)
        return super()._build_generation_config(body, model_generation_config, use_cb)

    def _build_completion(self, request_id: str, content: str, *args: Any, **options: Any) -> Any:
        # With a parser, the content is read from the tokens again, and the stop sequence with it.
        content = cut_at_stop(content, current_job().stop)
        return super()._build_completion(request_id, content, *args, **options)


class TextHandler(_OneModelHandler, CompletionHandler):
    """Answers `/v1/completions`."""

    _options = CompletionOptions


async def _with_end(pieces: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """A stream with the event that ends it in OpenAI's protocol."""
    async for piece in pieces:
        yield piece
    yield "data: [DONE]\n\n"
