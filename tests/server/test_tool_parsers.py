"""Tool calls in text: every cutting of a text gives what the whole gives, and what is no call stays content."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flover.server.tool_parsers import FORMATS, REQUIRED, CallArguments, CallBegin, Content, ToolParser, detect

ALL = {**FORMATS, "required": REQUIRED}


def read(name: str, pieces: list[str]) -> tuple[str, list[list[str]]]:
    """-> content, and name and arguments of each call."""
    parser = ToolParser(ALL[name])
    content, calls = "", []
    for events in [*map(parser.push, pieces), parser.finish()]:
        for event in events:
            if isinstance(event, Content):
                content += event.text
            elif isinstance(event, CallBegin):
                assert event.number == len(calls)
                calls.append([event.name, ""])
            else:
                assert isinstance(event, CallArguments)
                assert event.text
                calls[event.number][1] += event.text
    return content, calls


A = '{"city": "Paris \\"}]{[", "n": [1, {"x": "}"}]}'
CASES: list[tuple[str, str, str, list[list[str]]]] = [
    ("hermes", "hello", "hello", []),
    ("hermes", " spaced \n ", " spaced \n ", []),
    ("hermes", f'<tool_call>\n{{"name": "f", "arguments": {A}}}\n</tool_call>', "", [["f", A]]),
    ("hermes", f'Let me see.\n<tool_call>{{"arguments": {A}, "name": "f"}}</tool_call>', "Let me see.", [["f", A]]),
    (
        "hermes",
        '<tool_call>{"name":"f","arguments":{}}</tool_call>\n<tool_call>{"name":"g","arguments":{"a":1}}</tool_call>\n',
        "",
        [["f", "{}"], ["g", '{"a":1}']],
    ),
    ("hermes", "a <tool_cal> b", "a <tool_cal> b", []),
    ("hermes", "<<tool_call>", "<<tool_call>", []),
    ("hermes", "<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
    ("hermes", '<tool_call>{"nam": 1}</tool_call> x', '<tool_call>{"nam": 1}</tool_call> x', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b', "", [["f", '{"a": "b']]),
    ("hermes", '<tool_call>{"name": "f"}', "", [["f", ""]]),
    ("hermes", '<tool_call>{"na', '<tool_call>{"na', []),
    ("hermes", "1 < 2 <tool", "1 < 2 <tool", []),
    ("llama3_json", f'{{"name": "f", "parameters": {A}}}', "", [["f", A]]),
    ("llama3_json", '{"name":"f","parameters":{}}; {"name":"g","parameters":{}}', "", [["f", "{}"], ["g", "{}"]]),
    ("llama3_json", 'The answer is {"name": "f"}.', 'The answer is {"name": "f"}.', []),
    ("llama3_json", '{"a": 1}', '{"a": 1}', []),
    ("llama3_json", "{1: 2}", "{1: 2}", []),
    ("llama3_json", '{"name": "f", "parameters": null}', "", [["f", "null"]]),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {A}}}, {{"name": "g", "arguments": {{}}}}]',
        "",
        [["f", A], ["g", "{}"]],
    ),
    ("mistral", "[TOOL", "[TOOL", []),
    (
        "required",
        f'[{{"name": "f", "parameters": {A}}},\n {{"name": "g", "parameters": {{}}}}]',
        "",
        [["f", A], ["g", "{}"]],
    ),
    ("required", '[{"name": "f", "parameters": {"a', "", [["f", '{"a']]),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_whole_and_every_cut(name: str, text: str, content: str, calls: list[list[str]]) -> None:
    assert read(name, [text]) == (content, calls)
    assert read(name, list(text)) == (content, calls)
    for i in range(len(text)):
        assert read(name, [text[:i], text[i:]]) == (content, calls)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["hermes", "mistral", "llama3_json", "required"]),
    st.lists(
        st.tuples(st.text(min_size=1, max_size=9), st.dictionaries(st.text(max_size=5), JSON, max_size=4)),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_any_calls_cut_anywhere(name: str, calls: list[tuple[str, Any]], seed: int, indented: bool) -> None:
    key = "arguments" if name in ("hermes", "mistral") else "parameters"
    indent = 1 if indented else None
    objects = [json.dumps({"name": tool, key: value}, indent=indent) for tool, value in calls]
    text = {
        "hermes": "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects),
        "mistral": f"[TOOL_CALLS][{', '.join(objects)}]",
        "llama3_json": "; ".join(objects),
        "required": f"[{', '.join(objects)}]",
    }[name]
    rng, pieces = random.Random(seed), []
    while text:
        n = rng.randint(1, 9)
        pieces.append(text[:n])
        text = text[n:]
    content, read_calls = read(name, pieces)
    assert content == ""
    assert [(tool, json.loads(arguments)) for tool, arguments in read_calls] == calls


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(ALL)),
    st.text(alphabet='<tool_call>/{}[]":,nameargumentsTOOL_CALLS; \n\\1', max_size=60),
    st.integers(0, 60),
)
def test_no_text_is_lost_or_told_twice(name: str, text: str, cut: int) -> None:
    whole = read(name, [text])
    assert read(name, [text[:cut], text[cut:]]) == whole
    if not whole[1] and name != "required":
        assert whole[0] == text


def test_the_format_of_a_template() -> None:
    assert detect("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert detect('{% if tools %}{"name": x, "parameters": y}{% endif %}') == "llama3_json"
    assert detect("{% if tools %}[TOOL_CALLS]") == "mistral"
    assert detect("{{ messages }}") is None
    assert detect(None) is None
