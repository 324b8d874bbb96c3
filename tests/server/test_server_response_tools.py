"""Function tools in /v1/responses: the openai client makes of the events what it gets of the whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from serving import Server, serve

from flover.server.response_input import as_messages

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "unit": {"enum": ["c", "f"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}
TIME: Any = {"type": "function", "name": "get_time", "description": "now"}
NAMED: Any = {"type": "function", "name": "get_weather"}
ARGUMENTS = '{"city": "Ur", "unit": "c"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
TIMED = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--tool-call-parser", "hermes") as server:
        yield server
        server.check_conservation()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def asked(**more: Any) -> Any:
    return {"model": "kjv-llama", "input": "How is the weather?", "tools": [WEATHER, TIME], **more}


def items(response: Any) -> list[Any]:
    """What does not differ between two answers."""
    return [
        (one.type, one.status, one.name, one.arguments)
        if one.type == "function_call"
        else (one.type, one.status, one.content[0].text)
        for one in response.output
    ]


def both(client: openai.OpenAI, **more: Any) -> tuple[Any, list[Any]]:
    """The whole answer and the events of the streamed one, which the client has joined to the same items."""
    whole = client.responses.create(**asked(**more))
    with client.responses.stream(**asked(**more)) as stream:
        events = list(stream)
    assert items(events[-1].response) == items(whole)  # type: ignore[union-attr]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return whole, events


def check_events(events: list[Any]) -> None:
    """Every item is opened, filled and closed in its order, under one id, and the deltas join to what is done."""
    output = events[-1].response.output
    for index, item in enumerate(output):
        mine = [event for event in events if getattr(event, "output_index", None) == index]
        first, *_, last = mine
        assert (first.type, last.type) == ("response.output_item.added", "response.output_item.done")
        assert first.item.id == last.item.id == item.id
        assert {event.item_id for event in mine if hasattr(event, "item_id")} == {item.id}
        deltas = "".join(event.delta for event in mine if event.type.endswith(".delta"))
        if item.type == "function_call":
            assert first.item.call_id == item.call_id
            assert first.item.arguments == ""
            (done,) = (event for event in mine if event.type == "response.function_call_arguments.done")
            assert (done.arguments, done.name) == (deltas, item.name) == (item.arguments, item.name)
        else:
            assert deltas == item.content[0].text
    indices = [event.output_index for event in events if hasattr(event, "output_index")]
    assert indices == sorted(indices)


def test_calls_in_free_text(client: openai.OpenAI) -> None:
    written = f"Let me see. {CALL}\n{TIMED}"
    whole, events = both(client, max_output_tokens=300, extra_body={"guided_choice": [written]})
    assert items(whole) == [
        ("message", "completed", "Let me see."),
        ("function_call", "completed", "get_weather", ARGUMENTS),
        ("function_call", "completed", "get_time", "{}"),
    ]
    assert (whole.status, whole.output_text, whole.tool_choice) == ("completed", "Let me see.", "auto")
    assert [tool.name for tool in whole.tools] == ["get_weather", "get_time"]
    assert len({one.call_id for one in whole.output[1:]}) == 2
    check_events(events)
    kinds = [event.type for event in events]
    assert kinds.count("response.function_call_arguments.delta") > 4
    assert events[-1].type == "response.completed"


def test_a_named_function_and_a_required_one(client: openai.OpenAI) -> None:
    seed = {"seed": 5}
    whole, events = both(client, tool_choice=NAMED, max_output_tokens=200, extra_body=seed)
    (call,) = whole.output
    assert (call.type, call.name, whole.tool_choice.name) == ("function_call", "get_weather", "get_weather")
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    check_events(events)
    one: Any = {"tool_choice": "required", "parallel_tool_calls": False, "tools": [WEATHER]}
    whole, events = both(client, max_output_tokens=200, extra_body=seed, **one)
    (call,) = whole.output
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    assert not whole.parallel_tool_calls
    check_events(events)


def test_a_call_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    whole, events = both(client, tool_choice=NAMED, max_output_tokens=3, extra_body={"seed": 5})
    assert (whole.status, whole.output[0].status) == ("incomplete", "incomplete")
    assert events[-1].type == "response.incomplete"


def test_without_a_call_it_is_the_text(client: openai.OpenAI) -> None:
    more: Any = {"extra_body": {"seed": 3}, "max_output_tokens": 12, "include": ["message.output_text.logprobs"]}
    auto, events = both(client, **more)
    check_events(events)
    none = client.responses.create(**asked(tool_choice="none", **more))
    assert auto.output_text == none.output_text == client.responses.create(**asked(tools=[], **more)).output_text
    assert len(auto.output[0].content[0].logprobs) == 12
    assert len(events[-1].response.output[0].content[0].logprobs) == 12


def test_the_conversation_goes_on(client: openai.OpenAI) -> None:
    """Items of the answer are sent back as they are, with the call's output."""
    first = client.responses.create(**asked(max_output_tokens=200, extra_body={"guided_choice": [f"Hm. {CALL}"]}))
    output = {"type": "function_call_output", "call_id": first.output[1].call_id, "output": "hot"}  # type: ignore[union-attr]
    back: Any = [{"role": "user", "content": "How?"}, *[one.model_dump() for one in first.output], output]
    again = client.responses.create(**asked(input=back, max_output_tokens=4))
    assert again.output_text
    user, assistant, tool = as_messages(back)
    assert (user["role"], assistant["role"], assistant["content"]) == ("user", "assistant", "Hm.")
    (call,) = assistant["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
    assert tool == {"role": "tool", "tool_call_id": call["id"], "content": "hot"}
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    (alone, _) = as_messages([back[2], {**output, "output": parts}])
    assert (alone["role"], len(alone["tool_calls"])) == ("assistant", 1)


CALLED = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),  # a chat's form
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools"),
        ({"tools": [{"type": "function", "name": "f", "parameters": 7}]}, "tools"),
        ({"tools": [TIME, TIME]}, "tools"),
        ({"tools": [TIME], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": "required", "text": {"format": {"type": "json_object"}}}, "tool_choice"),
        ({"input": [{**CALLED, "arguments": {}}]}, "input"),
        ({"input": [{**CALLED, "arguments": "{"}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_tools_and_items(server: Server, body: Any, param: str) -> None:
    answer = server.http.post("/v1/responses", json={"input": "x", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
