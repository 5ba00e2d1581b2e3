"""A tiny model behind a server in a thread of the tests, and clients for it."""

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch

from packed_reference import pruned_checkpoint
from prunus.evaluation.generation import token_settings
from prunus.model.loading import load_model
from prunus.model.tokenizer import load_tokenizer
from prunus.serving.gate import Gate
from prunus.serving.reader import PromptReader
from prunus.serving.server import build_app, make_server, open_socket
from tiny_tokenizer import VOCABULARY, byte_tokenizer

#: Longest wait in seconds for something that takes milliseconds on an idle machine.
PATIENCE = 120
CONTEXT = 256
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def served_checkpoint(folder: Path) -> Path:
    """A tiny pruned checkpoint with a tokenizer and a chat template, which writes letters only."""
    pruned_checkpoint(folder, "llama", vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    letters = {tokenizer.convert_tokens_to_ids(chr(code)) for code in range(ord("a"), ord("z") + 1)}
    from transformers import GenerationConfig

    GenerationConfig(
        suppress_tokens=sorted(set(range(VOCABULARY)) - letters), repetition_penalty=1.5
    ).save_pretrained(folder)
    return folder


@dataclass
class Running:
    """A server that runs in a thread.

    Attributes:
        clients: closes them.
    """

    name: str
    model: Any
    tokenizer: Any
    gate: Gate
    generation: Any
    port: int
    clients: contextlib.ExitStack

    @functools.cached_property
    def client(self) -> openai.OpenAI:
        return self.client_with("unused")

    def client_with(self, api_key: str) -> openai.OpenAI:
        url = f"http://127.0.0.1:{self.port}/v1"
        return self.clients.enter_context(
            openai.OpenAI(base_url=url, api_key=api_key, max_retries=0, timeout=PATIENCE)
        )

    def expected(self, prompt: str, tokens: int) -> str:
        inputs = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        ids = inputs["input_ids"]
        with torch.no_grad():
            found = self.model.generate(
                input_ids=ids,
                attention_mask=inputs["attention_mask"],
                max_new_tokens=tokens,
                do_sample=False,
            )
        return self.tokenizer.decode(found[0, ids.shape[1] :])

    def is_idle(self) -> bool:
        return not self.gate.jobs


@contextlib.contextmanager
def running(folder: Path, template: str | None = TEMPLATE, **options: Any) -> Iterator[Running]:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    tokenizer.chat_template = template
    model.generation_config = token_settings(model.generation_config)
    started = threading.Event()
    with (
        contextlib.closing(PromptReader(tokenizer)) as reader,
        open_socket("127.0.0.1", 0) as listener,
    ):
        gate, generation = build_app(folder.name, model, reader, **options)
        port = listener.getsockname()[1]
        server = make_server(gate, started.set)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        try:
            assert started.wait(PATIENCE)
            with contextlib.ExitStack() as clients:
                yield Running(folder.name, model, tokenizer, gate, generation, port, clients)
        finally:
            gate.cancel()
            server.should_exit = True
            thread.join(PATIENCE)
            generation.shutdown()
            assert not thread.is_alive()


class Brake:
    """Counts the steps of a model, and lets it go no further than allowed."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._forward = model.forward
        self.steps = 0
        self.reached = threading.Event()  # a request is being computed
        self.release = threading.Event()

    def __enter__(self) -> "Brake":
        def forward(*arguments: Any, **options: Any) -> Any:
            self.steps += 1
            self.reached.set()
            assert self.release.wait(PATIENCE)
            return self._forward(*arguments, **options)

        self._model.forward = forward
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._model.forward = self._forward


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def send_request(port: int, path: str, body: bytes) -> socket.socket:
    """Send a request by hand; the caller reads the answer, or goes away."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}", "", ""]
    client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    client.sendall("\r\n".join(lines).encode() + body)
    return client
