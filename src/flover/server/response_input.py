"""What /v1/responses takes, as a chat has it: items become messages, flat tools nested ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flover.server.errors import invalid
from flover.server.tools import NAME, Tool
from flover.show import show

TEXTS = ("input_text", "output_text", "text")
Message = dict[str, Any]


def as_messages(items: Sequence[dict[str, Any]]) -> list[Message]:
    """The conversation; ApiError for items that are no messages, calls or outputs of calls.

    Calls belong to the assistant's message before them: templates know one message with all the calls of a turn.
    """
    messages: list[Message] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _text(item.get("content"))})
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(_call(item))
        elif kind == "function_call_output":
            call_id = _string(item, "call_id")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": _text(item.get("output"))})
        else:
            raise invalid(f"input must hold messages, function calls and their outputs, got {show(item)}", "input")
    return messages


def _text(content: Any) -> Any:
    """Parts joined; what else it may be is for the template's check."""
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, dict) else {} for part in content]
    if not all(part.get("type") in TEXTS and isinstance(part.get("text"), str) for part in parts):
        raise invalid(f"input: content must be text, got {show(content)}", "input")
    return "\n".join(part["text"] for part in parts)


def _call(item: dict[str, Any]) -> dict[str, Any]:
    function = {name: _string(item, name) for name in ("name", "arguments")}
    return {"id": _string(item, "call_id"), "type": "function", "function": function}


def _string(item: dict[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise invalid(f"input: {item['type']} needs {name}, got {show(item)}", "input")
    return value


def as_chat_tools(tools: Sequence[Tool]) -> list[Tool]:
    """ApiError for one that is no function: nothing else runs here."""
    return [_chat_tool(tool) for tool in tools]


def _chat_tool(tool: Tool) -> Tool:
    name = tool.get("name") if tool.get("type") == "function" else None
    if not isinstance(name, str) or not NAME.fullmatch(name):
        wanted = "{'type': 'function', 'name': letters, digits, _ . or -, 'parameters': ...}"
        raise invalid(f"tools must hold {wanted}, got {show(tool)}", "tools")
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def as_chat_choice(choice: str | Tool | None) -> str | Tool | None:
    """`check_tools` refuses what this does not know."""
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice
