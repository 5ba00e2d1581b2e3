"""`prunus serve`, asked by OpenAI's own client."""

import contextlib
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch

from command_line import call
from plane_reference import quantized_checkpoint
from prunus import pack
from prunus.model import tokenizer as reading
from prunus.serving import server as serving
from serving_cases import (
    CONTEXT,
    PATIENCE,
    Brake,
    Running,
    running,
    send_request,
    served_checkpoint,
    wait_until,
)
from tiny_tokenizer import VOCABULARY

PROMPT = "once upon"
HELLO = [{"role": "user", "content": "hello"}]
HELLO_TEXT = "user: hello\nassistant:"
FORMS = ["dense", "packed", "compressed", "adapter"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("serving")
    dense = served_checkpoint(root / "dense")
    pack(dense, root / "packed")
    quantized_checkpoint(dense, root / "compressed")
    return {form: root / form for form in FORMS}


@pytest.fixture(scope="module")
def adapter(folders) -> Path:
    """What peft itself saves of a LoRA whose update is not zero."""
    peft = pytest.importorskip("peft", reason="adapters need the extra adapters")
    from prunus.model.loading import load_model

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load_model(folders["dense"]), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folders["adapter"])
    return folders["adapter"]


@pytest.fixture(scope="module")
def dense(folders):
    with running(folders["dense"]) as server:
        yield server


@pytest.fixture(scope="module")
def exact(folders):
    """A server whose model computes in float32."""
    with running(folders["dense"]) as server:
        server.model.float()
        yield server


def chat(server: Running, tokens: int = 12, **options):
    return server.client.chat.completions.create(
        model=server.name, messages=HELLO, max_tokens=tokens, **options
    )


def complete(server: Running, tokens: int = 12, **options):
    return server.client.completions.create(
        model=server.name, prompt=PROMPT, max_tokens=tokens, **options
    )


# --- answers ---


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_model_answers_as_transformers_does(folders, form, request):
    if form == "adapter":
        request.getfixturevalue("adapter")
    with running(folders[form]) as server:
        answer = chat(server)
        assert answer.choices[0].message.content == server.expected(HELLO_TEXT, 12)
        assert answer.choices[0].finish_reason == "length"
        assert answer.model == form
        assert answer.usage.prompt_tokens == len(HELLO_TEXT)
        assert answer.usage.completion_tokens == 12

        pieces = list(chat(server, stream=True))
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert text == answer.choices[0].message.content
        assert pieces[-1].choices[0].finish_reason == "length"
        assert pieces[-1].usage.completion_tokens == 12
        assert len(pieces) > 6, "the text must come in pieces"

        answer = complete(server)
        assert answer.choices[0].text == server.expected(PROMPT, 12)
        pieces = list(complete(server, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text


def test_a_stream_ends_as_the_protocol_says(dense):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 2, "stream": True}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", dense.port, timeout=PATIENCE)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    events = connection.getresponse().read().decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-1])
    connection.close()


@pytest.mark.parametrize("several", [False, True])
def test_an_answer_ends_before_the_first_stop_sequence(dense, several):
    whole = dense.expected(HELLO_TEXT, 16)
    stop = whole[6:9]
    text = whole[: whole.index(stop)]
    given = ["never met", stop] if several else stop
    answer = chat(dense, 16, stop=given)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 16, "generation must end there too"
    pieces = list(chat(dense, 16, stop=given, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    assert pieces[-1].choices[0].finish_reason == "stop"

    whole = dense.expected(PROMPT, 16)
    stop = whole[6:9]
    text = whole[: whole.index(stop)]
    assert complete(dense, 16, stop=stop).choices[0].text == text
    pieces = list(complete(dense, 16, stop=stop, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == text


def test_sampling_is_on_with_a_temperature_and_follows_the_seed(dense):
    def sample(**options):
        return complete(dense, 10, **options).choices[0].text

    greedy = dense.expected(PROMPT, 10)
    assert sample() == sample(temperature=0) == greedy
    assert sample(temperature=1.5, seed=3) == sample(temperature=1.5, seed=3)
    assert len({sample(temperature=1.5, seed=seed) for seed in range(3)}) == 3


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-40, 1e-6])
def test_a_temperature_of_almost_nothing_takes_the_likeliest_token(dense, temperature):
    greedy = dense.expected(PROMPT, 10)
    assert complete(dense, 10, temperature=temperature).choices[0].text == greedy
    settings = dense.model.generation_config
    settings.do_sample, settings.temperature = True, temperature
    try:
        assert complete(dense, 10).choices[0].text == greedy
    finally:
        settings.do_sample = settings.temperature = None


def test_a_bias_of_whole_numbers_or_fractions_chooses_tokens(dense):
    token = dense.tokenizer.convert_tokens_to_ids("q")
    for bias in ({str(token): 100}, {str(token): 99.5, "3": -100}):
        assert complete(dense, 4, logit_bias=bias).choices[0].text == "qqqq"
        assert chat(dense, 4, logit_bias=bias).choices[0].message.content == "qqqq"


def test_the_name_of_a_request_is_sent_back_if_it_is_short(dense):
    def name(given: str) -> str:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", dense.port)) as connection:
            connection.request("GET", "/v1/models", headers={"X-Request-ID": given})
            return connection.getresponse().headers["X-Request-ID"]

    assert name("request 1") == "request 1"
    for given in ("x" * 129, "x" * 60_000, "\xe9", "a\tb"):
        assert re.fullmatch(r"[0-9a-f-]{36}", name(given))


def test_parts_of_text_and_the_names_of_roles(dense):
    parts = [{"type": "text", "text": "hello"}]
    answer = dense.client.chat.completions.create(
        model="dense",
        messages=[{"role": "developer", "content": "be"}, {"role": "user", "content": parts}],
        max_completion_tokens=5,
    )
    expected = dense.expected("system: be\nuser: hello\nassistant:", 5)
    assert answer.choices[0].message.content == expected
    parts = [{"type": "image_url", "image_url": {"url": "http://localhost/x.png"}}]
    with pytest.raises(openai.BadRequestError, match="takes text only"):
        dense.client.chat.completions.create(
            model="dense", messages=[{"role": "user", "content": parts}]
        )


def test_the_model_is_known_under_its_name_alone(dense, tmp_path):
    assert [model.id for model in dense.client.models.list()] == ["dense"]
    assert dense.client.models.retrieve("dense").id == "dense"
    with pytest.raises(openai.NotFoundError, match="this server has 'dense'"):
        dense.client.models.retrieve("org/other")
    for name in ("gpt-4o", str(tmp_path), "", "dense@main", "org/x:y.gguf"):
        with pytest.raises(openai.NotFoundError, match="this server has 'dense'") as refused:
            dense.client.chat.completions.create(model=name, messages=HELLO)
        assert refused.value.code == "model_not_found"
        assert refused.value.param == "model"


@pytest.mark.parametrize("are_texts", [(True, True), (False, False), (True, False)])
def test_several_prompts_have_an_answer_each(dense, are_texts):
    prompts = ["once upon", "a"]
    given = [
        prompt if is_text else dense.tokenizer(prompt)["input_ids"]
        for prompt, is_text in zip(prompts, are_texts, strict=True)
    ]
    answer = complete(dense, 5, extra_body={"prompt": given})
    expected = [dense.expected(prompt, 5) for prompt in prompts]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.prompt_tokens == 10
    assert answer.usage.completion_tokens == 10
    streamed = ["", ""]
    for piece in complete(dense, 5, stream=True, extra_body={"prompt": given}):
        streamed[piece.choices[0].index] += piece.choices[0].text
    assert streamed == expected
    one = complete(dense, 5, extra_body={"prompt": given[0]})
    assert [choice.text for choice in one.choices] == expected[:1]


@pytest.mark.parametrize(("echo", "tokens"), [(False, 3), (True, 3), (True, 0)])
def test_log_probabilities_are_those_of_the_model(exact, monkeypatch, echo, tokens):
    from prunus.serving import generation

    monkeypatch.setattr(generation, "_LOGITS", 4 * VOCABULARY)  # in slices of four tokens
    [choice] = complete(exact, tokens, echo=echo, logprobs=2).choices
    text = exact.expected(PROMPT, tokens) if tokens else ""
    assert choice.text == PROMPT * echo + text
    assert choice.finish_reason == "length"
    ids = exact.tokenizer(PROMPT + text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = exact.model(ids).logits[0, :-1].log_softmax(-1)
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == list(range(len(choice.text)))
    first = 1 if echo else len(PROMPT)
    if echo:
        assert found.token_logprobs.pop(0) is found.top_logprobs.pop(0) is None
    own = scores.gather(1, ids[0, 1:, None])[first - 1 :, 0]
    torch.testing.assert_close(torch.tensor(found.token_logprobs), own, rtol=0, atol=1e-5)
    for place, top in enumerate(found.top_logprobs, first - 1):
        # Bytes that are no letters have the same text, and the likeliest of them counts.
        assert max(top.values()) == pytest.approx(scores[place].max().item(), abs=1e-5)
        assert len(top) <= 3 and found.tokens[place + 1 - first + echo] in top


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"tokenized_requests": False}])
def test_lm_eval_scores_through_the_server(exact, folders, options):
    pytest.importorskip("tenacity", reason="needs lm-eval[api]")
    models = pytest.importorskip("lm_eval.models.openai_completions", reason="needs the extra eval")
    from lm_eval.api.instance import Instance

    client = models.LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{exact.port}/v1/completions",
        tokenizer_backend="huggingface",
        pretrained="dense",
        tokenizer=str(folders["dense"]),
        max_length=CONTEXT,
        max_retries=1,
        **options,
    )
    pairs = [
        ("once", " upon"),
        ("a time", " there"),
        ("x", "y"),
        ("once", exact.expected("once", 2)),
    ]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for (context, more), (score, greedy) in zip(pairs, client.loglikelihood(asked), strict=True):
        ids = exact.tokenizer(context + more, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores = exact.model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
        own = scores.gather(1, ids[0, len(context) :, None])
        assert score == pytest.approx(own.sum().item(), abs=1e-4)
        assert greedy == bool((own[:, 0] == scores.max(-1).values).all())


# --- several clients ---


def test_max_concurrent_requests_are_computed_at_once(folders):
    with running(folders["packed"], max_concurrent=2) as server:
        expected = server.expected(HELLO_TEXT, 12)
        together = threading.Barrier(2)
        forward = server.model.forward
        met = threading.local()

        def meet(*arguments, **options):
            if not hasattr(met, "other"):
                together.wait(PATIENCE)  # passes only when two threads are here
                met.other = True
            return forward(*arguments, **options)

        server.model.forward = meet
        with ThreadPoolExecutor(2) as clients:
            answers = list(clients.map(lambda _: chat(server), range(2)))
        assert [answer.choices[0].message.content for answer in answers] == [expected] * 2


def test_requests_wait_and_those_beyond_are_sent_away(folders):
    with running(folders["dense"], max_waiting=1) as server, Brake(server.model) as brake:
        with ThreadPoolExecutor(2) as clients:
            answers = [clients.submit(chat, server, 3)]
            assert brake.reached.wait(PATIENCE)
            assert get(server, "/ready")[0] == 200
            answers.append(clients.submit(chat, server, 3))
            wait_until(lambda: len(server.gate.jobs) == 2)
            assert get(server, "/ready")[0] == 503
            assert get(server, "/health")[0] == 200, "a full server is well"
            with pytest.raises(openai.InternalServerError) as refused:
                chat(server)
            assert refused.value.status_code == 503
            assert refused.value.code == "overloaded"
            assert int(refused.value.response.headers["Retry-After"]) > 0
            brake.release.set()
            texts = [answer.result().choices[0].message.content for answer in answers]
            assert texts == [server.expected(HELLO_TEXT, 3)] * 2
        wait_until(server.is_idle)
        assert get(server, "/ready")[0] == 200


def ask(server: Running, method: str, path: str, body: bytes | None = None, **headers: str):
    """The status and the JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request(method, path, body, headers=headers)
    answer = connection.getresponse()
    status, content = answer.status, json.loads(answer.read())
    connection.close()
    return status, content


def get(server: Running, path: str, **headers: str):
    return ask(server, "GET", path, **headers)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_generation(dense, stream):
    body = {"prompt": PROMPT, "max_tokens": 200, "stream": stream}
    with Brake(dense.model) as brake:
        client = send_request(dense.port, "/v1/completions", json.dumps(body).encode())
        assert brake.reached.wait(PATIENCE)
        [job] = dense.gate.jobs
        client.close()
        assert job.cancelled.wait(PATIENCE)
        brake.release.set()
        # The only thread is free for the next request, and the brake has counted both.
        assert complete(dense, 3).choices[0].text == dense.expected(PROMPT, 3)
        assert brake.steps < 20
    wait_until(dense.is_idle)


def test_a_client_that_goes_away_leaves_the_queue(dense):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
    with Brake(dense.model) as brake, ThreadPoolExecutor(1) as clients:
        answer = clients.submit(complete, dense, 2)
        assert brake.reached.wait(PATIENCE)
        waiting = send_request(dense.port, "/v1/completions", body)
        wait_until(lambda: len(dense.gate.jobs) == 2)
        waiting.close()
        wait_until(lambda: len(dense.gate.jobs) == 1)
        brake.release.set()
        assert answer.result().choices[0].text
        assert brake.steps == 2


def test_requests_that_are_slow_to_arrive_are_ended(folders, monkeypatch):
    monkeypatch.setattr(serving, "_ARRIVAL", 0.5)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    half = [b"", head, head + b'Content-Length: 99\r\n\r\n{"prompt"']
    with running(folders["dense"]) as server, ThreadPoolExecutor(1) as pool:
        with Brake(server.model) as brake:
            slow = pool.submit(complete, server, 2)
            assert brake.reached.wait(PATIENCE)
            for sent in half:
                with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as client:
                    client.sendall(sent)
                    answer = b""
                    while piece := client.recv(1000):  # a piece each time does not help
                        answer += piece
                assert answer.startswith(b"HTTP/1.1 408 ")
            with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as client:
                client.settimeout(0.02)
                answer = b""
                while not answer:
                    with contextlib.suppress(TimeoutError):
                        client.sendall(b"G")
                        answer = client.recv(1000)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert not slow.done(), "a request that has arrived may take long"
            brake.release.set()
        assert slow.result().choices[0].text == server.expected(PROMPT, 2)


def test_each_request_is_a_line_of_the_log(dense, caplog):
    with caplog.at_level(logging.INFO, "prunus.serving"):
        complete(dense, 3)
        list(chat(dense, 4, stream=True))
        get(dense, "/v1/a%0Ab?key=secret")
        wait_until(lambda: len(caplog.records) == 3)
    lines = [re.sub(r"\d+\.\d+ s", "TIME", record.getMessage()) for record in caplog.records]
    assert lines == [
        f"POST /v1/completions 200, {len(PROMPT)} + 3 tokens, TIME",
        f"POST /v1/chat/completions 200, {len(HELLO_TEXT)} + 4 tokens, TIME",
        "GET /v1/a%0Ab 404, 0 + 0 tokens, TIME",
    ]


# --- what is refused ---


def test_a_prompt_that_is_too_long_is_refused_and_an_answer_ends_at_the_context(dense):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=f"may have {CONTEXT}") as refused:
            dense.client.completions.create(
                model="dense", prompt="x" * CONTEXT, max_tokens=5, stream=stream
            )
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match=f"may have {CONTEXT}"):
            dense.client.chat.completions.create(
                model="dense", messages=[{"role": "user", "content": "x" * 1000}], stream=stream
            )
    answer = dense.client.completions.create(
        model="dense", prompt="x" * (CONTEXT - 4), max_tokens=100
    )
    assert answer.usage.total_tokens == CONTEXT
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        dense.client.completions.create(model="dense", prompt="")


BAD_OPTIONS = {
    "n": 2,
    "logprobs": True,
    "presence_penalty": 1.0,
    "response_format": {"type": "json_object"},
    "generation_config": '{"num_beams": 100000}',
    "chat_template_kwargs": {"chat_template": "{% for x in range(10**9) %}{% endfor %}"},
    "temperature": -1,
    "top_p": 0,
    "max_tokens": 0,
    "stop": [""],
    "seed": "1",
    "logit_bias": {"99999": 1},
    "messages": [],
    "tools": "many",
    "unheard_of": 1,
}
BAD_TEXT_OPTIONS = {
    "suffix": "end",
    "prompt": [[1, True]],
    "logprobs": 1,
    "max_tokens": 0,
    "logit_bias": {"5": 101},
}


def test_options_that_cannot_be_obeyed_are_refused_by_name(dense):
    for name, value in BAD_OPTIONS.items():
        body = {"model": "dense", "messages": HELLO, name: value}
        with pytest.raises(openai.BadRequestError, match=name):
            dense.client.post("/chat/completions", body=body, cast_to=object)
    with Brake(dense.model) as brake:
        for name, value in BAD_TEXT_OPTIONS.items():
            with pytest.raises(openai.BadRequestError, match=name):
                complete(dense, stream=True, extra_body={name: value})
        for token in (-1, VOCABULARY, 2**70):
            with pytest.raises(openai.BadRequestError, match="prompt"):
                complete(dense, extra_body={"prompt": [5, token]})
        assert not brake.steps, "what is refused is not computed first"


def test_a_body_that_is_no_request_is_refused(dense):
    for body in (b"", b"[]", b"{", b"[" * 100_000):
        with send_request(dense.port, "/v1/completions", body) as client:
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert answer.status == 400
            assert json.loads(answer.read())["error"]["type"] == "invalid_request_error"
    # Of any size that is read, no more than fits into the context is made into tokens.
    for size, status in ((10**6, 400), (2**20 + 1, 413), (2**23 + 1, 413)):
        body = json.dumps({"prompt": "x" * (size - 14)}).encode()
        with send_request(dense.port, "/v1/completions", body) as client:
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert answer.status == status
            found = json.loads(answer.read())["error"]
            assert found["code"] == ("context_length_exceeded" if status == 400 else None)
    kind = {"Content-Type": "text/plain"}  # a page in a browser may send it to any address
    assert ask(dense, "POST", "/v1/completions", b'{"prompt": "a"}', **kind)[0] == 400


def test_other_endpoints_of_transformers_are_not_there(dense):
    gone = "/load_model /reset /v1/systemone /v1/responses /v1/audio/transcriptions /docs"
    for path in gone.split():
        for method in ("POST", "GET"):
            status, body = ask(dense, method, path, b"{}")
            assert status == 404
            assert "/v1/models" in body["error"]["message"]


def test_without_a_key_only_names_of_this_machine_are_answered(dense):
    assert get(dense, "/v1/models", Host="localhost:8000")[0] == 200
    status, body = get(dense, "/v1/models", Host="evil.example")
    assert status == 403 and "evil.example" in body["error"]["message"]


def test_a_key_is_asked_for(folders):
    with running(folders["dense"], api_key="secret") as server:
        for given in ("other", "", "secret2"):
            with pytest.raises(openai.AuthenticationError) as refused:
                server.client_with(given or "x").models.list()
            assert refused.value.code == "invalid_api_key"
        status, body = get(server, "/v1/models")
        assert status == 401 and body["error"]["code"] == "invalid_api_key"
        assert [model.id for model in server.client_with("secret").models.list()] == ["dense"]
        assert get(server, "/health", Host="example.org")[0] == 200
        assert get(server, "/ready")[0] == 200


def test_a_failure_of_the_model_is_an_error_and_the_server_goes_on(dense, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError('a "bad" weight')

    with monkeypatch.context() as patched:
        patched.setattr(dense.model, "forward", fail)
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            chat(dense)
        with pytest.raises(openai.APIError):
            list(chat(dense, stream=True))
    assert caplog.text.count('RuntimeError: a "bad" weight') == 2
    assert chat(dense).choices[0].message.content


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "/v1/completions"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 'x' * 10**10 }}", "too much memory"),
        ("{{ 'x' * 2000 }}", "the prompt has 2000 bytes"),
    ],
)
def test_a_template_that_cannot_be_used_is_an_error_of_the_client(folders, template, message):
    with (
        running(folders["dense"], template) as server,
        pytest.raises(openai.BadRequestError, match=message),
    ):
        chat(server)


def test_health_answers_while_a_template_runs_for_ever(folders, monkeypatch):
    """The order is checked, not the time: /health answers before the template is ended."""
    monkeypatch.setattr(reading, "_SECONDS", 1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with running(folders["dense"], loop, max_concurrent=2) as server, ThreadPoolExecutor(2) as pool:
        looping = [pool.submit(chat, server) for _ in range(2)]
        wait_until(lambda: len(server.gate.jobs) == 2)
        assert [get(server, "/health")[0] for _ in range(20)] == [200] * 20
        assert not any(answer.done() for answer in looping)
        for answer in looping:
            with pytest.raises(openai.BadRequestError, match="takes too long"):
                answer.result()
        assert complete(server, 3).choices[0].text == server.expected(PROMPT, 3)


# --- the command ---


def refused(*arguments: object) -> str:
    return " ".join(call("serve", *arguments, status=2).output.split())


def test_bad_input_ends_before_the_model_is_loaded(folders, monkeypatch, tmp_path):
    monkeypatch.delenv("PRUNUS_API_KEY", raising=False)

    def load(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(serving, "load_model", load)
    model = folders["dense"]
    assert "can be reached from other machines" in refused(model, "--host", "0.0.0.0")
    assert "not empty" in refused(model, "--api-key", "")
    assert "at least 1 concurrent" in refused(model, "--max-concurrent", "0")
    with serving.open_socket("127.0.0.1", 0) as taken:  # as of a server that loads its model
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be used" in refused(model, "--port", port)


def test_without_its_libraries_the_extra_is_named(folders, monkeypatch):
    monkeypatch.setattr(serving, "_LIBRARIES", ("starlette", "no_such_library"))
    assert "needs no_such_library: pip install '.[serve]'" in refused(folders["dense"])


def test_sigterm_finishes_the_running_request_and_nothing_is_downloaded(folders):
    """In a process of its own, whose hub is a socket that nobody may connect to."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        hub.setblocking(False)
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
            "PRUNUS_API_KEY": "secret",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("HF_HUB_OFFLINE", None)
        process = subprocess.Popen(
            [sys.executable, "-m", "prunus", "serve", folders["packed"], "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        with process:
            try:
                line = process.stderr.readline()
                found = re.fullmatch(r"prunus: packed at (http://127\.0\.0\.1:\d+/v1)\n", line)
                assert found, line + process.stderr.read()
                client = openai.OpenAI(base_url=found[1], api_key="secret", timeout=PATIENCE)
                stream = client.completions.create(
                    model="packed", prompt=PROMPT, max_tokens=64, stream=True
                )
                pieces = [next(stream)]
                process.send_signal(signal.SIGTERM)
                pieces += stream
                client.close()
                assert pieces[-1].choices[0].finish_reason == "length"
                assert pieces[-1].usage.completion_tokens == 64
                assert process.wait(PATIENCE) == 0
                request, end = process.stderr.read().splitlines()
                tokens = rf"{len(PROMPT)} \+ 64 tokens"
                line = rf"prunus: POST /v1/completions 200, {tokens}, \d+\.\d+ s"
                assert re.fullmatch(line, request)
                assert end == "prunus: stopped"
            finally:
                process.kill()
        with pytest.raises(BlockingIOError):
            hub.accept()
