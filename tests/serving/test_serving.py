"""`prunus serve`: the server of transformers with a packed model, asked by OpenAI's own client."""

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prunus.serving import server as serving
from transformers import GenerationConfig
from transformers.utils.import_utils import is_serve_available

from command_line import call
from packed_reference import pruned_checkpoint
from prunus import pack
from tiny_tokenizer import VOCABULARY, byte_tokenizer

openai = pytest.importorskip("openai", reason="the server needs the extra serve")
if not is_serve_available():
    pytest.skip("the server needs the extra serve", allow_module_level=True)
#: Longest wait in seconds for something that takes milliseconds on an idle machine.
PATIENCE = 120
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
QUESTION = "once upon a time"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a tiny packed model that writes letters only, and its chat template."""
    root = tmp_path_factory.mktemp("serving")
    pruned_checkpoint(root / "dense", "llama", vocab_size=VOCABULARY, max_position_embeddings=256)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "dense")
    letters = {tokenizer.convert_tokens_to_ids(chr(code)) for code in range(ord("a"), ord("z") + 1)}
    others = sorted(set(range(VOCABULARY)) - letters)
    settings = GenerationConfig(suppress_tokens=others, repetition_penalty=1.5)
    settings.save_pretrained(root / "dense")
    pack(root / "dense", root / "packed")
    return root


@pytest.fixture(scope="module")
def hub() -> Iterator[socket.socket]:
    """A hub that nobody may ask."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


@pytest.fixture(scope="module")
def client(root, hub) -> Iterator[openai.OpenAI]:
    """A client of a server in a process of its own, which is called as a user calls it."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "prunus", "serve", "packed", "--port", "0"],
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        try:
            said = ""
            while not (ready := re.search(r"running on (http://\S+:\d+) ", said)):
                line = process.stderr.readline()
                assert line, said
                said += line
            assert "prunus: starting transformers serve; clients call the model packed\n" in said
            threading.Thread(target=process.stderr.read, daemon=True).start()
            url = f"{ready[1]}/v1"
            with openai.OpenAI(
                base_url=url, api_key="none", timeout=PATIENCE, max_retries=0
            ) as asking:
                yield asking
            process.terminate()
            process.wait(PATIENCE)
        finally:
            process.kill()


def test_a_streamed_chat_is_what_prunus_generate_writes(client, root):
    pieces = list(
        client.chat.completions.create(
            model="packed",
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=12,
            temperature=0,
            stream=True,
        )
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    options = ("--chat", "--max-new-tokens", 12, "--temperature", 0)
    assert text == call("generate", root / "packed", "--prompt", QUESTION, *options).stdout.strip()
    assert len(text) == 12
    assert pieces[-1].choices[0].finish_reason == "length"
    assert len(pieces) > 6, "the text must come in pieces"


def test_a_completion_is_what_prunus_generate_writes(client, root):
    answer = client.completions.create(
        model="packed", prompt=QUESTION, max_tokens=12, temperature=0, stop=["q"]
    )
    options = ("--max-new-tokens", 12, "--temperature", 0)
    written = call("generate", root / "packed", "--prompt", QUESTION, *options).stdout.strip()
    assert answer.choices[0].text == written[: written.find("q") + 1 or None]


def test_the_server_has_this_model_alone_and_downloads_nothing(client, hub):
    assert [model.id for model in client.models.list()] == ["packed"]
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="owner/other", prompt=QUESTION)
    address = str(client.base_url).replace("/v1/", "/load_model")
    loading = client.post(address, body={"model": "owner/other"}, cast_to=str)
    assert '"status": "error"' in loading
    with pytest.raises(BlockingIOError):
        hub.accept()


def refused(*arguments: object) -> str:
    said = call("serve", *arguments, status=2).stderr.splitlines()
    assert said[-1].startswith("prunus: error: ")
    return said[-1]


def test_bad_input_is_one_sentence_before_the_model_is_loaded(root, monkeypatch, tmp_path):
    packed = root / "packed"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(packed, "--port", port)
        assert f"port {port} of 127.0.0.1 cannot be used (Address already in use)" in said
    assert "./gone' is neither a folder nor a hub id" in refused("./gone")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "dense"}')
    assert "is an adapter, which transformers serve does not load" in refused(tmp_path)
    weights = root / "dense" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    assert "pytorch_model.bin, a pickle" in refused(root / "dense")
    monkeypatch.setattr(serving, "_LIBRARIES", ("openai", "no_such_library"))
    assert "needs no_such_library: pip install '.[serve]'" in refused(packed)


def test_an_address_that_others_reach_is_warned_of(root, monkeypatch):
    served = {}
    monkeypatch.setattr("transformers.cli.serve.Serve", lambda **options: served.update(options))
    said = call("serve", root / "packed", "--host", "0.0.0.0", "--port", 0).stderr
    assert "the server asks for no key" in said
    assert served["force_model"] == str(root / "packed") and not served["trust_remote_code"]
