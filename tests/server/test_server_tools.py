"""Tool calls over HTTP, with the openai client: forced ones follow the schema, free ones are found, streams join."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from serving import serve

PARAMETERS = {
    "$defs": {"unit": {"enum": ["c", "f"]}},
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
TIME: Any = {"type": "function", "function": {"name": "get_time", "description": "now"}}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
MESSAGES: Any = [{"role": "user", "content": "How is the weather?"}]
WRITTEN = 'Let me see. <tool_call>\n{"name": "get_weather", "arguments": {"city": "Ur", "unit": "c"}}\n</tool_call>'


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with serve("--tool-call-parser", "hermes") as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    more = {"tools": [WEATHER], "max_tokens": 250, **more}
    return client.chat.completions.create(model="kjv-llama", messages=MESSAGES, **more)


def joined(stream: Any) -> tuple[str | None, dict[int, list[str]], set[str | None], int]:
    """-> content, calls by index as [id, name, arguments], finish reasons, and how many chunks held arguments."""
    content: str | None = None
    calls, reasons, pieces = {}, set(), 0
    for chunk in stream:
        for choice in chunk.choices:
            if choice.delta.content is not None:
                content = (content or "") + choice.delta.content
            for call in choice.delta.tool_calls or ():
                pieces += bool(call.function.arguments)
                if call.id:
                    assert call.type == "function"
                    calls[call.index] = [call.id, call.function.name, ""]
                calls[call.index][2] += call.function.arguments or ""
            if choice.finish_reason:
                reasons.add(choice.finish_reason)
    return content, calls, reasons, pieces


def test_a_named_function_and_its_stream(client: openai.OpenAI) -> None:
    whole = ask(client, tool_choice=NAMED, seed=5).choices[0]
    (call,) = whole.message.tool_calls
    assert call.function.name == "get_weather"
    assert call.id.startswith("call_")
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    assert (whole.message.content, whole.finish_reason) == (None, "stop")
    content, calls, reasons, pieces = joined(ask(client, tool_choice=NAMED, seed=5, stream=True))
    assert (content, reasons) == (None, {"stop"})
    assert [one[1:] for one in calls.values()] == [["get_weather", call.function.arguments]]
    assert pieces > 1


@pytest.mark.parametrize("parallel", [True, False])
def test_required(client: openai.OpenAI, parallel: bool) -> None:
    wanted: Any = {"tools": [WEATHER], "tool_choice": "required", "seed": 2, "parallel_tool_calls": parallel}
    whole = ask(client, **wanted).choices[0]
    calls = whole.message.tool_calls
    assert len(calls) >= 1 if parallel else len(calls) == 1
    if whole.finish_reason != "length":
        assert whole.finish_reason == "tool_calls"
        for call in calls:
            jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    _, streamed, reasons, _ = joined(ask(client, stream=True, **wanted))
    assert [one[1:] for one in streamed.values()] == [[c.function.name, c.function.arguments] for c in calls]
    assert reasons == {whole.finish_reason}


def test_auto_finds_calls_in_the_models_own_format(client: openai.OpenAI) -> None:
    forced = {"extra_body": {"guided_choice": [WRITTEN]}}
    whole = ask(client, tools=[WEATHER, TIME], **forced).choices[0]
    assert (whole.message.content, whole.finish_reason) == ("Let me see.", "tool_calls")
    assert whole.message.tool_calls[0].function.arguments == '{"city": "Ur", "unit": "c"}'
    content, calls, reasons, pieces = joined(ask(client, stream=True, **forced))
    assert content == "Let me see."
    assert [one[1:] for one in calls.values()] == [["get_weather", '{"city": "Ur", "unit": "c"}']]
    assert reasons == {"tool_calls"}
    assert pieces > 4


def test_none_and_no_call_are_plain_text(client: openai.OpenAI) -> None:
    plain = ask(client, tool_choice="none", seed=3, max_tokens=20).choices[0]
    assert plain.message.tool_calls is None
    auto = ask(client, seed=3, max_tokens=20).choices[0]
    assert auto.message.content == plain.message.content
    assert auto.finish_reason == plain.finish_reason == "length"
    content, calls, *_ = joined(ask(client, seed=3, max_tokens=20, stream=True))
    assert (content, calls) == (plain.message.content, {})


def test_a_conversation_with_calls_in_it(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Ur"}'}}
    messages: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "hot"},
    ]
    answer = client.chat.completions.create(model="kjv-llama", messages=messages, tools=[WEATHER], max_tokens=5)
    assert answer.choices[0].message.content
    call["function"]["arguments"] = "{"  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match="must be JSON"):
        client.chat.completions.create(model="kjv-llama", messages=messages, max_tokens=5)


def test_template_arguments_are_not_the_servers(client: openai.OpenAI) -> None:
    assert ask(client, max_tokens=3, extra_body={"chat_template_kwargs": {"enable_thinking": False}}).choices
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, extra_body={"chat_template_kwargs": {"messages": []}})
    assert error.value.param == "chat_template_kwargs"


def test_an_unknown_parser_is_refused_at_the_start(capfd: pytest.CaptureFixture[str]) -> None:
    from flover.cli import main

    assert main(["serve", "--tool-call-parser", "banana"]) == 2
    assert "hermes, llama3_json, mistral" in capfd.readouterr().err


@pytest.mark.slow
def test_references_of_a_function_are_its_own(client: openai.OpenAI) -> None:
    shape = {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"], "additionalProperties": False}
    child = {"type": "array", "items": {"$ref": "#"}, "minItems": 1, "maxItems": 1}
    tree = {"type": "object", "properties": {"c": child}, "required": [], "additionalProperties": False}
    for schema, wanted in (
        ({"$ref": "#/definitions/shape", "definitions": {"shape": shape}}, shape),
        ({"$ref": "#/$defs/unit", "$defs": {"unit": shape}}, shape),  # another unit than get_weather's
        (tree, tree),  # "#" is the function's parameters, not the list of calls
    ):
        tool: Any = {"type": "function", "function": {"name": "f", "parameters": schema}}
        only = {"tools": [tool, WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
        for seed in range(8):
            call = ask(client, **{**only, "seed": seed, "temperature": 2.0}).choices[0].message.tool_calls[0].function
            if call.name == "f":
                jsonschema.validate(json.loads(call.arguments), wanted)
                break
        else:
            pytest.fail("f was never called")


def test_deep_parameters(client: openai.OpenAI) -> None:
    schema: Any = {}
    for _ in range(450):
        schema = {"anyOf": [schema]}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(openai.BadRequestError, match="nested too deeply|recursion") as error:
        ask(client, tools=[tool], tool_choice="required")
    assert error.value.param == "tools"
