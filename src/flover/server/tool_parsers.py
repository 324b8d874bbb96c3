"""Tool calls in a model's text: pure state machines, a character at a time.

So how the text was cut into pieces cannot matter, and a streamed answer joined is the whole one. Arguments are given
out as the model wrote them, never encoded again. What begins like a call and is none becomes content.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

SPACE = " \t\r\n"


class Content(NamedTuple):
    text: str


class CallBegin(NamedTuple):
    number: int
    name: str


class CallArguments(NamedTuple):
    number: int
    text: str


Event = Content | CallBegin | CallArguments


class BrokenCallError(ValueError):
    """The object is no call."""


class CallReader:
    """One JSON object with a name and arguments (or parameters), in either order."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = False
        self.arguments = ""  # not given out yet
        self._depth, self._in_string, self._escaped = 0, False, False
        self._key: str | None = None  # whose value is read
        self._string = ""  # the string that is read at depth 1: a key, or the name
        self._begun = False  # the value of `_key`

    def push(self, character: str) -> None:
        """BrokenCallError if this makes it no call."""
        value = self._key is not None
        if self._in_string:
            self._in_text(character)
        elif self._depth == 1 and character == "," and value:
            self._key, self._string = None, ""
        elif self._depth == 1 and character == ":" and self._string and not value:
            self._key, self._begun, self._string = json.loads(self._string), False, ""
            return
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._end()
        elif character == '"':
            self._in_string = True
            self._string = '"' if self._depth == 1 else ""
        elif self._depth == 1 and not value and character not in SPACE + ",":
            raise BrokenCallError
        if value and self._key in ("arguments", "parameters") and (self._begun or character not in SPACE):
            self._begun = True
            self.arguments += character
            if self._depth == 1 and character in '}]"' and not self._in_string:
                self._key = ""  # what follows the value is no part of it

    def _in_text(self, character: str) -> None:
        if self._depth == 1:
            self._string += character
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            if self._key == "name":
                self._read_name()

    def _read_name(self) -> None:
        try:
            self.name = json.loads(self._string)
        except ValueError:
            raise BrokenCallError from None
        self._key, self._string = "", ""

    def _end(self) -> None:
        if not self.name:
            raise BrokenCallError
        self._key, self.done = None, True


@dataclass(frozen=True, slots=True)
class Format:
    """How a model writes its calls.

    Args:
        begin: what comes before the first call; "": the text begins with it.
        end: what comes after a call; "": calls follow each other until the text ends.
        between: characters that may stand between calls.
    """

    begin: str
    end: str
    between: str = SPACE


FORMATS = {
    "hermes": Format("<tool_call>", "</tool_call>"),
    "llama3_json": Format("", "", SPACE + ";,"),
    "mistral": Format("[TOOL_CALLS]", "", SPACE + "[],"),
}
REQUIRED = Format("", "", SPACE + "[],")  # what `tool_choice: "required"` makes the model write


@dataclass
class ToolParser:
    """Text in, events out; `finish` at its end."""

    format: Format
    num_calls: int = 0
    _mode: str = "content"  # content, between, call, after
    _held: str = ""  # content that may be the beginning of a call, or space before one
    _raw: str = ""  # of the call that is read
    _call: CallReader = field(default_factory=CallReader)
    _closed: bool = False  # content has begun, where calls can only come first

    def push(self, text: str) -> list[Event]:
        return merged(event for character in text for event in self._one(character))

    def finish(self) -> list[Event]:
        """What was held back. A call that the text broke off stays as far as it came, if its name is known."""
        events: list[Event] = []
        if self._mode == "call" and self._call.name is None:
            events = [Content(self._held + self._raw)]
        elif self._held.strip(SPACE) or not self.num_calls:
            events = [Content(self._held)]
        self._held = self._raw = ""
        return merged(events)

    def _one(self, character: str) -> Iterable[Event]:
        if self._mode == "content":
            return self._in_content(character)
        if self._mode == "call":
            return self._in_call(character)
        if self._mode == "after":
            return self._after(character)
        return self._between(character)

    def _in_content(self, character: str) -> Iterable[Event]:
        begin = self.format.begin
        if not begin:
            if self._closed:
                return [Content(character)]
            if character in "{[":
                return self._between(character)
            self._held += character
            if character in SPACE:
                return []
            self._closed = True
            return self._release()
        self._held += character
        stripped = self._held.lstrip(SPACE)
        if stripped == begin:
            self._mode = "between"
            return []
        if begin.startswith(stripped):  # space, or the beginning of the beginning
            return []
        # the longest tail that may still become space and a beginning stays
        for cut in range(1, len(self._held) + 1):
            if begin.startswith(self._held[cut:].lstrip(SPACE)):
                return self._release(cut)
        return self._release()

    def _release(self, count: int | None = None) -> list[Event]:
        count = len(self._held) if count is None else count
        text, self._held = self._held[:count], self._held[count:]
        return [Content(text)] if text else []

    def _between(self, character: str) -> Iterable[Event]:
        if character == "{":
            self._mode, self._call, self._raw = "call", CallReader(), ""
            return self._in_call(character)
        self._mode = "between"
        if character in self.format.between:
            self._held += "" if self.num_calls else character
            return []
        self._mode, self._closed = "content", True
        self._held += character
        return self._release()

    def _in_call(self, character: str) -> Iterable[Event]:
        self._raw += character
        known = self._call.name is not None
        try:
            self._call.push(character)
        except ValueError:
            text, self._held, self._raw = self._held + self._raw, "", ""
            self._mode, self._closed = "content", True
            return [Content(text)]
        events: list[Event] = []
        if self._call.name is not None and not known:
            events.append(CallBegin(self.num_calls, self._call.name))
            self.num_calls += 1
            self._held = ""
        if self._call.name is not None and self._call.arguments:
            events.append(CallArguments(self.num_calls - 1, self._call.arguments))
            self._call.arguments = ""
        if self._call.done:
            self._mode = "after" if self.format.end else "between"
        return events

    def _after(self, character: str) -> Iterable[Event]:
        """The end of the format, or the next call at once."""
        self._held += character
        stripped, end = self._held.lstrip(SPACE), self.format.end
        if stripped == end:
            self._mode, self._held = "content", ""
        elif not end.startswith(stripped):
            self._mode = "content"
            return self._release()
        return []


def merged(events: Iterable[Event]) -> list[Event]:
    """Neighbours of one kind in one."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and event.number == last.number:
            result[-1] = CallArguments(last.number, last.text + event.text)
        elif not isinstance(event, Content) or event.text:
            result.append(event)
    return result


def detect(template: str | None) -> str | None:
    """The format that a chat template teaches; None where it knows no tools."""
    if template is None or "tools" not in template:
        return None
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    return "llama3_json" if '"parameters"' in template else None
