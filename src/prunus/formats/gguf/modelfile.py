"""The Modelfile beside a GGUF file, from which Ollama makes a model.

Ollama compares the chat template in a GGUF file with those that it has templates for, and takes
none where it finds no match. So the Modelfile brings one, in the language of Go, wherever the chat
template is as simple as most are: text before and after each message. No list of families is
needed. The texts are read off the template itself, from what it makes of a few conversations, and
whether they are right is checked on longer ones.

    START question ANSWER answer END START question ANSWER …
    OPEN system CLOSE question ANSWER answer END START question ANSWER …

The grammar is that of https://docs.ollama.com/modelfile, as `parser/parser.go` in
https://github.com/ollama/ollama reads it. A value ends at the end of a line, unless it begins with
three quotation marks: then it ends at a line that ends with three. Nothing in it can be escaped,
and characters that are not printable are dropped. All texts are those of a stranger's model, so
only what comes out as it went in is written (`_instruction`).

The variables of templates are those of
https://github.com/ollama/ollama/blob/main/docs/template.mdx: `.Messages` are all messages, with
the system message as the first one, and `.System` is its text.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from prunus.model.open_folder import OpenFolder
from prunus.model.tokenizer import apply_chat_template, load_tokenizer

#: Makes the text of a conversation, given as its roles; the second argument is whether an answer
#: follows.
Render = Callable[[Sequence[str], bool], str]
# What is said in the conversations by which a template is known: role -> text.
_SAID = {"system": "Sys-Probe", "user": "Question-Probe", "assistant": "Answer-Probe"}
_TALK = ("user", "assistant", "user")
# A template for Ollama, in which texts and a condition stand for the words in capitals.
_FORM = (
    '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}'
    "{{ if CONDITION }}OPEN{{ $.System }}CLOSE{{ else }}START{{ end }}{{ .Content }}ANSWER"
    '{{ else if eq .Role "assistant" }}LEAD{{ .Content }}END{{ end }}{{ end }}'
)
# Where the system message is -> the condition for a question to follow it. "always" has the text
# around a system message also where there is none, as Llama 3.1 does. "last" puts it before the
# last question, as Mistral does.
_CONDITIONS = {
    "never": "false",
    "first": "and $.System (le $i 1)",
    "always": "le $i 1",
    "last": "and $.System (eq (len (slice $.Messages $i)) 1)",
}


class ChatTexts(NamedTuple):
    """The texts around the messages of a conversation.

    Attributes:
        start: Before a question.
        answer: After a question; an answer follows.
        lead: Before an answer that is there already, after `answer`.
        end: After an answer.
        opening: Before a system message.
        closing: Between a system message and the question after it.
        default: The system message of conversations without one; empty for none.
        system: Where a system message goes, a key of `_CONDITIONS`.
    """

    start: str
    answer: str
    lead: str
    end: str
    opening: str = ""
    closing: str = ""
    default: str = ""
    system: str = "never"

    def rendered(self, roles: Sequence[str]) -> str:
        """What Ollama makes of a conversation whose answer follows.

        >>> ChatTexts("[INST] ", "[/INST]", " ", "</s>").rendered(["user"])
        '[INST] Question-Probe[/INST]'
        """
        system = _SAID["system"] if "system" in roles else self.default
        questions, text, after = roles.count("user"), "", ""
        for number in range(questions):
            is_place = number == (questions - 1 if self.system == "last" else 0)
            opens = is_place and (system or self.system == "always")
            text += after + (f"{self.opening}{system}{self.closing}" if opens else self.start)
            text += _SAID["user"] + self.answer
            after = self.lead + _SAID["assistant"] + self.end
        return text

    @property
    def template(self) -> str:
        """The template in the language of Go."""
        texts = {"OPEN": self.opening, "CLOSE": self.closing, "START": self.start}
        texts |= {"ANSWER": self.answer, "LEAD": self.lead, "END": self.end}
        texts["CONDITION"] = _CONDITIONS[self.system]
        return re.sub("|".join(texts), lambda name: texts[name[0]], _FORM)


def chat_texts(render: Render) -> ChatTexts | None:
    """The texts of a chat template; None where it has another form, or Go would misread them."""
    with contextlib.suppress(ValueError):
        start, answer = _split(render(("user",), True), "user")
        _, lead, later, _ = _split(render(_TALK, True), *_TALK)
        end = _split(render(_TALK[:2], False), *_TALK[:2])[2]
        texts = ChatTexts(start, answer, lead.removeprefix(answer), end)
        candidates, later = [texts], later.removeprefix(end)
        with contextlib.suppress(ValueError):
            opening, closing, _ = _split(render(("system", "user"), True), "system", "user")
            default = start.removeprefix(opening).removesuffix(closing)
            texts = texts._replace(opening=opening, closing=closing, system="first")
            given = texts._replace(start=later, default=default)
            always = texts._replace(start=later, system="always")
            candidates = [texts, texts._replace(system="last"), given, always]
        return next((texts for texts in candidates if _agrees(texts, render)), None)
    return None


def _agrees(texts: ChatTexts, render: Render) -> bool:
    """Whether the texts give what the template gives, for short and long conversations."""
    if any(mark in "".join(texts) for mark in ("{{", "}}")) or "{{{" in texts.template:
        return False
    talks: list[tuple[str, ...]] = [("user",), _TALK, (*_TALK, "assistant", "user")]
    talks += [] if texts.system == "never" else [("system", *roles) for roles in talks]
    return all(texts.rendered(roles) == render(roles, True) for roles in talks)


def _split(text: str, *roles: str) -> tuple[str, ...]:
    """The texts before, between and after messages, which must be there in this order."""
    said = "(.*?)".join(_SAID[role] for role in roles)
    if (match := re.fullmatch(f"(.*?){said}(.*)", text, re.DOTALL)) is None:
        raise ValueError(f"no messages of {', '.join(roles)}")
    return match.groups()


def modelfile(name: str, folder: OpenFolder, fields: Mapping[str, Any]) -> str:
    """The Modelfile of a GGUF file.

    Args:
        name: The name of the file, which lies beside it.
        folder: The checkpoint, with its tokenizer.
        fields: The fields of the file, with their types.
    """
    values = {key.removeprefix("tokenizer."): field.value for key, field in fields.items()}
    tokens, texts = values.get("ggml.tokens", []), None
    special = {x: values.get(f"ggml.{x}_token_id", len(tokens)) for x in ("bos", "eos", "eot")}
    named = {x: tokens[index] for x, index in special.items() if index < len(tokens)}
    template = values.get("chat_template") or ""
    if template and "strftime_now" not in template:  # the date would be that of today for ever
        # llama.cpp puts BOS before a text where the file says so.
        first = named.get("bos", "") if values.get("ggml.add_bos_token") else ""
        texts = chat_texts(_renders(folder, template, first))
    lines = ["# Made by prunus: ollama create NAME -f THIS_FILE", _instruction("FROM", f"./{name}")]
    if texts is not None:
        lines.append(_instruction("TEMPLATE", texts.template))
        lines += [_instruction("SYSTEM", texts.default)] if texts.default else []
    elif template:
        lines.append("# No TEMPLATE: Ollama reads the chat template of the file where it can.")
    stops = [texts.end.strip() if texts else "", named.get("eot", ""), named.get("eos", "")]
    stops = [stop for stop in dict.fromkeys(stops) if template and stop]
    return "\n".join([*lines, *(_instruction("PARAMETER stop", stop) for stop in stops), ""])


def _instruction(name: str, text: str) -> str:
    """A line that Ollama reads as `text`, or a comment that says why there is none.

    >>> _instruction("PARAMETER stop", "<|end|>"), _instruction("SYSTEM", chr(0))
    ('PARAMETER stop <|end|>', '# No SYSTEM: a Modelfile cannot hold its text.')
    """
    if '"""' in text or not re.sub(r"[\t\n\r]", "", text).isprintable():
        return f"# No {name}: a Modelfile cannot hold its text."
    return f"{name} {text}" if re.fullmatch(r'[^\s"]+', text) else f'{name} """{text}"""'


def _renders(folder: OpenFolder, template: str, first: str) -> Render:
    """What a template makes of conversations, without the text `first` at their beginning."""
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return functools.cache(  # each text takes a process
        lambda roles, answer_follows: apply_chat_template(
            tokenizer,
            [[{"role": role, "content": _SAID[role]} for role in roles]],
            answer_follows=answer_follows,
        )[0].removeprefix(first)
    )
