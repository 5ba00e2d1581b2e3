"""Requests that no client should send: each gets an answer, and the server goes on."""

import http.client
import json
import random
import socket
import urllib.request
from collections import Counter
from typing import Any

import pytest

from hostile_damage import VALUES, mutate_json
from serving_cases import PATIENCE, running, send_request, served_checkpoint

PATHS = ["/v1/completions", "/v1/chat/completions"]
ODD: list[Any] = [
    *(5e-324, 1e-310, -0.0, 1e308, -1e308, 2**31, 2**63, 10**400, float("nan"), float("inf"), "1"),
    *([2**40], [-1], [True], [None], {"0": 1}, {"2": 10**30}, {"-1": 5}, {"99999999": -100}, "NaN"),
    *({"a": 1}, ["\0"], "\ud800", "x" * 10_000, *VALUES),
]
FIELDS = """model prompt messages temperature top_p max_tokens seed stop n logit_bias logprobs echo
    top_logprobs stream stream_options user presence_penalty frequency_penalty best_of suffix tools
    response_format max_completion_tokens top_k generation_config chat_template"""


def body(dice: random.Random, path: str, model: str) -> bytes:
    """A request with some odd values, with damage, or no JSON at all."""
    text = (
        {"prompt": "once"} if path == PATHS[0] else {"messages": [{"role": "user", "content": "a"}]}
    )
    good: Any = {"model": model, "max_tokens": 2, **text}
    kind = dice.random()
    if kind < 0.6:
        for name in dice.sample(FIELDS.split(), dice.choice([1, 1, 2])):
            good[name] = dice.choice(ODD)
    elif kind < 0.8:
        good = mutate_json(good, dice)
    elif kind < 0.9:
        deep = dice.choice([50, 2_000, 200_000])
        good["prompt"] = "@"
        left, right = dice.choice([("[", "]"), ('{"a":', "}"), ("[", "")])
        inner = left * deep + "1" + right * deep
        return json.dumps(good).replace('"@"', inner).encode()
    content = json.dumps(good).encode()
    if kind > 0.95:
        content = dice.randbytes(20) + content[: dice.randrange(len(content))]
    return content


@pytest.mark.parametrize("requests", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_every_answer_is_one_of_success_or_of_a_fault_of_the_client(requests, tmp_path):
    outcomes: Counter[int] = Counter()
    with running(served_checkpoint(tmp_path / "model")) as served:
        for number in range(requests):
            dice = random.Random(f"odd {number}")
            path = dice.choice(PATHS)
            content = body(dice, path, served.name)
            with (
                send_request(served.port, path, content) as client,
                http.client.HTTPResponse(client) as answer,
            ):
                answer.begin()
                answer.read()
            found = answer.status
            assert 200 <= found < 300 or 400 <= found < 500, (number, found, content[:300])
            outcomes[found] += 1
            # Half of a request, whose client leaves.
            with socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE) as client:
                head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n"
                half = head.encode() + content[:99]
                client.sendall(half[: dice.randrange(len(half))])
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/health") as health:
            assert health.status == 200
    print(dict(outcomes))
    assert outcomes[200] and sum(outcomes.values()) - outcomes[200] > requests / 3, outcomes
