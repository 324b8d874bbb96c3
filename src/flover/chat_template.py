"""Chat templates, rendered as transformers does: a conversation in, the text of the prompt out.

A template is code from a checkpoint: it runs in Jinja's sandbox, on checked copies of the messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flover.request import show

Messages = Sequence[Mapping[str, Any]]


def find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or chat_template of tokenizer_config.json: one source, or a list of named ones."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {str(t.get("name")): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        where = folder / "tokenizer_config.json"
        raise ValueError(f"{where}: chat_template must be text, got {type(template).__name__}")
    return template


def render(template: str, messages: Messages, add_generation_prompt: bool, tokens: Mapping[str, str]) -> str:
    """The prompt's text; `tokens` are the special tokens by name. Fails in any way that a template can."""
    return (
        _environment()
        .from_string(template)
        .render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **tokens,
        )
    )


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Checked copies, the text parts of a content list joined; ValueError names what is wrong."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a non-empty list of {{'role', 'content'}}, got {show(messages)}")
    chat = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message must be {{'role': text, 'content': text}}, got {show(message)}")
        content = message.get("content")
        if isinstance(content, list) and all(_is_text_part(part) for part in content):
            content = "\n".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ValueError(f"the content of a message must be text, got {show(content)}")
        chat.append({**message, "content": content})
    return chat


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """A sandbox in which a template can neither reach Python nor change its inputs."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
