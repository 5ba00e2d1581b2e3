"""A process that reads requests: it checks them, applies chat templates, and makes token ids.

All of that can take seconds, and a template can run for ever. Python runs one thread at a time, so
a thread would still hold up every other request. The process is forked before the model is loaded
and stays small. It forks a child for each request, which has limited time and memory.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import signal
import socketserver
import tempfile
import warnings
from dataclasses import asdict, dataclass
from inspect import signature
from typing import Any

from transformers.cli.serving.utils import BaseHandler, Modality

from prunus.hardware.errors import reason
from prunus.model.tokenizer import limit_process
from prunus.serving.gate import RequestError
from prunus.serving.requests import DEFAULT_TOKENS, ChatOptions, TextOptions, Work, parse_options

CHATS = "/v1/chat/completions"
#: Path of an endpoint -> what a request to it may hold.
OPTIONS: dict[str, type[ChatOptions | TextOptions]] = {
    CHATS: ChatOptions,
    "/v1/completions": TextOptions,
}
#: Smallest and largest limit of a body, in bytes. A list of prompts needs more than one of them.
_LEAST_BODY, _MOST_BODY = 2**20, 2**23
#: Most log-probabilities in an answer.
_MOST_SCORES = 2**19
#: Longest way to write a byte in JSON: \u0000.
_ESCAPED = 6
#: Seconds after which a child is given up. Its processor time is limited to less.
_PATIENCE = 60


@dataclass(frozen=True)
class Limits:
    """What every request must keep to."""

    name: str
    vocabulary: int
    #: largest number of tokens of prompt and answer together; None for no limit.
    context: int | None
    text: int  #: bytes of the longest text that can fit into the context

    @classmethod
    def of(cls, name: str, model: Any, tokenizer: Any) -> Limits:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        vocabulary = model.get_input_embeddings().num_embeddings
        if not isinstance(context, int):
            return cls(name, vocabulary, None, _MOST_BODY)
        longest = max(len(token.encode()) for token in tokenizer.get_vocab())
        return cls(name, vocabulary, context, min(context * longest, _MOST_BODY))

    @property
    def body(self) -> int:
        return min(max(self.text * _ESCAPED, _LEAST_BODY), _MOST_BODY)


class _Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Forks a child for each connection, and ends with the process that started it."""

    max_children = request_queue_size = 1000

    def __init__(self, path: str, tokenizer: Any) -> None:
        super().__init__(path, _Child)
        self.tokenizer, self._parent, self._folder = tokenizer, os.getpid(), os.path.dirname(path)

    def service_actions(self) -> None:
        """Called twice a second; ends the process when its parent was killed."""
        super().service_actions()
        if os.getppid() != self._parent:
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(0)

    def serve_alone(self) -> None:
        """Serve in a process that was just forked; does not return."""
        try:
            # The parent ends this process, after the requests that it still computes.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            # Libraries that run out of memory write pages about it. The client is told in a line.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            # Sockets and files of the parent must close when the parent closes them. No object
            # that owns one of them may be collected, because its number is used again here.
            gc.freeze()
            os.closerange(3, self.fileno())
            os.closerange(self.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
            self.serve_forever()
        finally:
            os._exit(1)


class _Child(socketserver.StreamRequestHandler):
    """Reads one request: a line with its path and limits, then the body; writes `Work` or error."""

    server: _Server

    def handle(self) -> None:
        path, limits = json.loads(self.rfile.readline())
        body = self.rfile.read()
        limit_process()
        try:
            found = _read(self.server.tokenizer, OPTIONS[path], Limits(**limits), body)
            answer = b"+" + found.model_dump_json().encode()
        except RequestError as error:
            told = (error.status, error.message, error.code, error.param)
            answer = b"-" + json.dumps(told).encode()
        except Exception as fault:  # a template and its arguments can raise any error
            if isinstance(fault, MemoryError):
                return
            told = (400, f"the request cannot be read: {reason(fault)}", None, None)
            answer = b"-" + json.dumps(told).encode()
        self.wfile.write(answer + b"\n")


class PromptReader:
    """Starts the process, and gives it the requests. To be made before the model is loaded."""

    def __init__(self, tokenizer: Any) -> None:
        if not hasattr(tokenizer, "_tokenizer"):
            raise ValueError(
                f"the tokenizer is a {type(tokenizer).__name__}, which cannot stream; the "
                "checkpoint needs a tokenizer.json"
            )
        self.tokenizer = tokenizer
        # Only this user may enter such a folder.
        self._folder = tempfile.TemporaryDirectory(prefix="prunus-serve-")
        self._path = f"{self._folder.name}/reader"
        server = _Server(self._path, tokenizer)
        with warnings.catch_warnings():
            # The child runs Python only, and none of the threads that the warning is about.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process = os.fork()
        if self._process == 0:
            server.serve_alone()
        server.server_close()

    def close(self) -> None:
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        self._folder.cleanup()

    async def read(self, path: str, limits: Limits, body: bytes) -> Work:
        """The work that a request to the endpoint `path` asks for."""
        reader, writer = await asyncio.open_unix_connection(self._path)
        try:
            writer.write(json.dumps([path, asdict(limits)]).encode() + b"\n" + body)
            writer.write_eof()
            async with asyncio.timeout(_PATIENCE):
                answer = await reader.read()
        except (OSError, TimeoutError):
            answer = b""
        finally:
            writer.close()
        if not answer.endswith(b"\n"):  # the child was ended by its limits
            raise RequestError(
                400,
                "the request takes too long to read, or too much memory: give a shorter prompt, "
                "or do without the chat template",
            )
        if answer[:1] == b"+":
            return Work.model_validate_json(answer[1:])
        status, message, code, param = json.loads(answer[1:])
        raise RequestError(status, message, code=code, param=param)


def unknown_model(requested: str, served: str) -> RequestError:
    return RequestError(
        404,
        f"the model {requested[:200]!r} does not exist here; this server has {served!r}",
        code="model_not_found",
        param="model",
    )


def _read(
    tokenizer: Any, kind: type[ChatOptions | TextOptions], limits: Limits, body: bytes
) -> Work:
    options = parse_options(kind, body)
    if options.model is not None and options.model != limits.name:
        raise unknown_model(options.model, limits.name)
    _check_tokens(options.logit_bias or (), limits, "logit_bias")
    found = options.model_dump(exclude_none=True)
    texts: Any
    if isinstance(options, ChatOptions):
        if options.max_completion_tokens is not None:
            found["max_tokens"] = options.max_completion_tokens
        # The template writes special tokens itself.
        texts, special, field = [_chat_text(tokenizer, options, limits)], False, "messages"
    else:
        texts, special, field = options.prompt, True, "prompt"
    prompts = []
    for text in texts:
        is_text = isinstance(text, str)
        # A text that cannot fit is refused before its tokens take time and memory.
        if is_text and (size := len(text.encode())) > limits.text:
            raise _too_long(f"{size} bytes", limits, field)
        ids = tokenizer(text, add_special_tokens=special)["input_ids"] if is_text else text
        if not ids:
            raise RequestError(400, "the prompt is empty; give some text", param=field)
        _check_tokens(ids, limits, field)
        least = len(ids) + (found.get("max_tokens") != 0)
        if limits.context is not None and least > limits.context:
            raise _too_long(f"{len(ids)} tokens", limits, field)
        prompts.append(ids)
    _check_scores(prompts, found, limits)
    if found.get("echo"):
        found["texts"] = [
            tokenizer.decode(text, skip_special_tokens=True) if isinstance(text, list) else text
            for text in texts
        ]
    return Work(**found, prompts=prompts, is_chat=kind is ChatOptions)


def _chat_text(tokenizer: Any, options: ChatOptions, limits: Limits) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            400, "the model has no chat template; use /v1/completions", param="messages"
        )
    messages = [message.model_dump(exclude_none=True) for message in options.messages]
    for message in messages:
        if message["role"] == "developer":  # OpenAI's newer name, which no template knows
            message["role"] = "system"
    messages = BaseHandler.get_processor_inputs_from_messages(messages, Modality.LLM)
    variables: dict[str, Any] = dict(options.chat_template_kwargs or {})
    # They choose how a template is applied, and which one.
    if reserved := sorted(variables.keys() & signature(tokenizer.apply_chat_template).parameters):
        reason = f"chat_template_kwargs: a request may not set {', '.join(reserved)}"
        raise RequestError(400, reason, param="chat_template_kwargs")
    variables["add_generation_prompt"] = True
    if options.tools:
        if (size := len(json.dumps(options.tools))) > limits.text:
            raise _too_long(f"{size} bytes of tools", limits, "tools")
        variables["tools"] = options.tools
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **variables))


def _check_tokens(tokens: Any, limits: Limits, field: str) -> None:
    for token in tokens:
        if not 0 <= token < limits.vocabulary:
            raise RequestError(
                400,
                f"{field}: token {token} is outside the vocabulary of {limits.vocabulary}",
                param=field,
            )


def _check_scores(prompts: list[list[int]], options: dict[str, Any], limits: Limits) -> None:
    """Refuse an answer that would take the server long to write."""
    answer = min(options.get("max_tokens", DEFAULT_TOKENS), limits.context or _MOST_SCORES)
    prompt = max(map(len, prompts)) if options.get("echo") else 0
    scores = len(prompts) * (prompt + answer) * (options.get("logprobs", -1) + 1)
    if scores > _MOST_SCORES:
        raise RequestError(
            400,
            f"logprobs: the answer may have {scores} of them, and {_MOST_SCORES} are the most; "
            "send fewer prompts at once",
            param="logprobs",
        )


def _too_long(size: str, limits: Limits, field: str) -> RequestError:
    return RequestError(
        400,
        f"the prompt has {size}, and prompt and answer together may have {limits.context} tokens; "
        "shorten it",
        code="context_length_exceeded",
        param=field,
    )
