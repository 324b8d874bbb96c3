"""Tools: what a request may say of them, the schema that makes the model call one, and the calls in an answer.

`tool_choice` "auto" finds calls in free text, as the model's format has them; "required" and a named function are
structured output, so that their arguments always follow the function's schema.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import Any

from flover.server.errors import invalid
from flover.server.tool_parsers import FORMATS, REQUIRED, CallArguments, CallBegin, Content, Event, ToolParser
from flover.show import show
from flover.structured import StructuredOutputsParams

Tool = dict[str, Any]
MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def check_tools(tools: Sequence[Tool] | None, choice: str | Tool | None) -> None:
    """ApiError for tools that are none, and for a choice among them that is none."""
    if len(tools or ()) > MAX_TOOLS:
        raise invalid(f"tools holds {len(tools or ())} functions, the limit is {MAX_TOOLS}", "tools")
    names = [_checked_name(tool) for tool in tools or ()]
    if len(set(names)) < len(names):
        raise invalid(f"tools holds a name twice: {show(sorted(names))}", "tools")
    if isinstance(choice, str) and choice not in ("auto", "none", "required"):
        raise invalid(f"tool_choice must be auto, none, required or a function, got {show(choice)}", "tool_choice")
    if choice not in (None, "auto", "none") and not names:
        raise invalid(f"tool_choice needs tools, got {show(choice)}", "tool_choice")
    if isinstance(choice, dict) and chosen(choice) not in names:
        raise invalid(f"tool_choice must name one of {show(names)}, got {show(choice)}", "tool_choice")


def _checked_name(tool: Tool) -> str:
    function = tool.get("function") if tool.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not NAME.fullmatch(name):
        wanted = "{'type': 'function', 'function': {'name': letters, digits, _ . or -, ...}}"
        raise invalid(f"tools must hold {wanted}, got {show(tool)}", "tools")
    if not isinstance(function.get("parameters") or {}, dict):  # type: ignore[union-attr]
        raise invalid(f"tools: the parameters of {name} must be a JSON schema, got {show(tool)}", "tools")
    return name


def chosen(choice: str | Tool | None) -> str | None:
    """The name in a tool_choice that names a function."""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def call_schema(tools: Sequence[Tool] | None, choice: str | Tool | None, parallel: bool | None) -> Tool | None:
    """The JSON schema of a text that calls; None where the model may write what it likes.

    A named function: its arguments. "required": a list of names with parameters, of one call unless `parallel`.
    """
    functions = {tool["function"]["name"]: tool["function"].get("parameters") or _ANY for tool in tools or ()}
    name = chosen(choice)
    if name is not None:
        return dict(functions[name])
    if choice != "required":
        return None
    calls = [
        {
            "type": "object",
            "properties": {"name": {"enum": [name]}, "parameters": {"$ref": f"#/$defs/{name}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name in functions
    ]
    limit = {"maxItems": 1} if parallel is False else {}
    definitions = {name: _moved(schema, f"#/$defs/{name}") for name, schema in functions.items()}
    return {"type": "array", "minItems": 1, **limit, "items": {"anyOf": calls}, "$defs": definitions}


def call_format(
    tools: Sequence[Tool] | None,
    choice: str | Tool | None,
    parallel: bool | None,
    wanted: StructuredOutputsParams | None,
) -> StructuredOutputsParams | None:
    """What the text must follow: `wanted`, or a call if the choice asks for one; ApiError for both."""
    try:
        called = call_schema(tools, choice, parallel)
    except RecursionError:
        raise invalid("tools are nested too deeply", "tools") from None
    if called is None:
        return wanted
    if wanted is not None:
        raise invalid("tool_choice asks for a call, which excludes another format of the text", "tool_choice")
    try:
        return StructuredOutputsParams(json=called, whitespace_pattern=" ?")  # as models write calls
    except ValueError as error:
        raise invalid(f"tools: {error}", "tools") from None


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references within itself (`#`, `#/$defs/x`, `#/definitions/x`) hold at another place."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and (target == "#" or target.startswith("#/")):
        moved["$ref"] = place + target[1:]
    return moved


_ANY: Tool = {"type": "object"}


class CallWriter:
    """The text of one choice as OpenAI's message or deltas.

    Args:
        parser: finds the calls. name: of the function whose arguments the whole text is, instead.
    """

    def __init__(self, parser: ToolParser | None, name: str | None = None) -> None:
        self._parser, self._name = parser, name
        self._begun = False

    def whole(self, text: str) -> dict[str, Any]:
        """content and tool_calls of a message."""
        content = ""
        calls: dict[int, dict[str, Any]] = {}
        for event in self.events(text, ending=True):
            if isinstance(event, Content):
                content += event.text
            elif isinstance(event, CallBegin):
                calls[event.number] = _begun(event)
            else:
                calls[event.number]["function"]["arguments"] += event.text
        return {"content": content or None, "tool_calls": list(calls.values())} if calls else {"content": content}

    def delta(self, text: str, ending: bool) -> dict[str, Any]:
        """The delta of new text; empty if it tells nothing yet."""
        delta: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        for event in self.events(text, ending):
            if isinstance(event, Content):
                delta["content"] = delta.get("content", "") + event.text
            elif isinstance(event, CallBegin):
                calls.append({"index": event.number, **_begun(event)})
            elif calls and calls[-1]["index"] == event.number:
                calls[-1]["function"]["arguments"] += event.text
            else:
                calls.append({"index": event.number, "function": {"arguments": event.text}})
        return {**delta, "tool_calls": calls} if calls else delta

    def finish_reason(self, reason: str | None) -> str | None:
        """As OpenAI has it: a named function keeps "stop"."""
        return "tool_calls" if reason == "stop" and self._parser is not None and self._parser.num_calls else reason

    def events(self, text: str, ending: bool) -> list[Event]:
        """What new text brings."""
        if self._parser is not None:
            return [*self._parser.push(text), *(self._parser.finish() if ending else ())]
        first: list[Event] = [] if self._begun else [CallBegin(0, self._name or "")]
        self._begun = True
        return [*first, CallArguments(0, text)] if text else first


def call_writer(tools: Sequence[Tool] | None, choice: str | Tool | None, tool_format: str | None) -> CallWriter | None:
    """What finds the calls of an answer; None where there can be none. tool_format: of the model, if it is known."""
    if not tools:
        return None
    name = chosen(choice)
    if name is not None:
        return CallWriter(None, name)
    if choice == "required":
        return CallWriter(ToolParser(REQUIRED))
    return None if tool_format is None else CallWriter(ToolParser(FORMATS[tool_format]))


def _begun(event: CallBegin) -> dict[str, Any]:
    function = {"name": event.name, "arguments": ""}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
