"""Chat templates that run for ever, fill memory, or are damaged."""

import pytest

from prunus.model import tokenizer
from prunus.model.tokenizer import apply_chat_template
from refusals import assert_refused
from tiny_tokenizer import byte_tokenizer

CHATS = [[{"role": "user", "content": text}] for text in ("Grüß dich", "x")]
LOOP = "{% for i in range(9999) %}"


def applied(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return apply_chat_template(tokenizer, CHATS)


def test_a_template_gives_its_text():
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    assert applied(template) == ["<user>Grüß dich<assistant>", "<user>x<assistant>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'x' * 10**10 }}", "more than 512 MiB of memory"),
        ("{{ '%9999999999d' % 1 }}", "cannot be applied|more than 512 MiB"),
        ("{{ 'x' * 5000000 }}", "4 MiB of text"),
        ("{% for", "cannot be applied: TemplateSyntaxError"),
        ("{{ messages[3].role }}", "cannot be applied: UndefinedError"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('short') if messages[0].content == 'x' else 'y' }}", "short"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_a_template_that_asks_for_too_much_is_refused(template, message):
    assert_refused(ValueError, message, applied, template)


def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(tokenizer, "_SECONDS", 0.2)
    assert_refused(
        ValueError, r"did not end within 0\.2 s", applied, LOOP * 6 + "x" + "{% endfor %}" * 6
    )
