"""Chat templates, rendered as transformers does: a conversation in, the text of the prompt out.

A template is code from a checkpoint: it runs in Jinja's sandbox, on checked copies of the messages, and every loop and
macro in it looks at the clock and at how much has been written. Output is limited in characters, products in size.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flover.show import show

Messages = Sequence[Mapping[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
RENDER_SECONDS = 2.0
MAX_RENDERED = 1 << 24  # characters
RESERVED = {"messages", "conversation", "tools", "documents", "add_generation_prompt", "tokenize", "return_dict"}
RESERVED |= {"chat_template", "continue_final_message", "padding", "truncation", "max_length"}
MAX_WIDTH = 4096  # of padding
WIDE = re.compile(r"[%:][^%:{}]*\d{5}|%[^%a-zA-Z]*\*|:[^{}]*\{")  # format strings that could be wider
TICK = "flover_tick"  # how a loop says that it goes round


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


def render(
    template: str,
    messages: Messages,
    add_generation_prompt: bool,
    tokens: Mapping[str, str],
    tools: Sequence[Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """The prompt's text. Fails in any way that a template can.

    Args:
        tokens: the special tokens by name. arguments: more variables, such as enable_thinking; see `check_arguments`.
    """
    deadline = time.monotonic() + RENDER_SECONDS

    def tick() -> str:
        if time.monotonic() > deadline:
            raise TemplateError(f"it takes more than {RENDER_SECONDS:g} s")
        return ""

    variables = {**tokens, **(arguments or {}), "messages": messages, "tools": tools, "documents": None, TICK: tick}
    pieces, length = [], 0
    for piece in _compiled(template).generate(variables, add_generation_prompt=add_generation_prompt):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_RENDERED:
            raise TemplateError(f"it writes more than {MAX_RENDERED} characters")
    return "".join(pieces)


def check_arguments(arguments: Any, tokens: Mapping[str, str]) -> None:
    """ValueError for template arguments that are none, or that would replace what the template gets anyway."""
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise ValueError(f"chat_template_kwargs must be an object, got {show(arguments)}")
    for name in arguments:
        if name in RESERVED or name in tokens or name == TICK:
            raise ValueError(f"chat_template_kwargs holds {show(name)}, which is not the caller's to set")


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Checked copies, text parts joined, arguments of tool calls parsed; ValueError says what is wrong."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a non-empty list of {{'role', 'content'}}, got {show(messages)}")
    return [_checked(message) for message in messages]


def _checked(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"a message must be {{'role': text, 'content': text}}, got {show(message)}")
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise ValueError(f"messages: role must be one of {', '.join(ROLES)}, got {show(role)}")
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise ValueError(f"messages: a tool message needs tool_call_id, got {show(message)}")
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "\n".join(part["text"] for part in content)
    if content is None and role == "assistant" and calls:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"the content of a message must be text, got {show(content)}")
    more = {"tool_calls": _checked_calls(calls)} if calls else {}
    return {**message, "content": content, **more}


def _checked_calls(calls: Any) -> list[dict[str, Any]]:
    """Templates want the arguments as an object, where clients send JSON."""
    checked = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"messages: a tool call must have a function with a name, got {show(call)}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise ValueError(f"messages: arguments of a tool call must be JSON, got {show(arguments)}") from None
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """In which a template can neither reach Python, nor change its inputs, nor loop or multiply without end."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for kind in (nodes.For, nodes.Macro, nodes.CallBlock):
            for node in list(tree.find_all(kind)):
                assert isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock))
                call = nodes.Call(nodes.Name(TICK, "load"), [], [], None, None)
                node.body.insert(0, nodes.Output([call]).set_lineno(node.lineno))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(one) if isinstance(one, (str, list, tuple)) else None for one in (left, right)]
        if operator == "**" or (operator == "*" and any(sizes)):
            times = right if sizes[0] is not None else left
            if operator == "**" or not isinstance(times, int) or times * max(filter(None, sizes)) > MAX_RENDERED:
                raise TemplateError(f"the operator {operator} makes too much of it")
        if operator == "%" and isinstance(left, str) and WIDE.search(left):
            raise TemplateError(f"the operator % makes more than {MAX_WIDTH} characters")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in ("ljust", "rjust", "center", "zfill", "expandtabs"):
            return False  # any of them makes gigabytes of a few characters
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        text = getattr(value, "__self__", None)
        if isinstance(text, str) and value.__name__ in ("format", "format_map") and WIDE.search(text):
            raise TemplateError(f"{value.__name__} makes more than {MAX_WIDTH} characters")
        return super().wrap_str_format(value)


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


def _environment() -> _Sandbox:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    for name in ("center", "format", "wordwrap", "indent"):
        environment.filters[name] = _bounded(environment.filters[name])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _bounded(function: Any) -> Any:
    """A filter whose numbers are small."""

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        wide = isinstance(args[0], str) and function.__name__ == "do_format" and WIDE.search(args[0])
        if wide or any(isinstance(n, int) and n > MAX_WIDTH for n in (*args, *kwargs.values())):
            raise TemplateError(f"the filter {function.__name__} makes more than {MAX_WIDTH} characters")
        return function(*args, **kwargs)

    return bounded
