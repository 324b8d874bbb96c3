"""The output items of a response as they grow: a message for text, a function_call for each call, in their order.

Invariant: the items that events build are those of the whole text.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from flover.server.tool_parsers import CallBegin, Content, Event
from flover.server.tools import CallWriter

Item = dict[str, Any]
Change = tuple[str, dict[str, Any]]  # the name of an event and its fields: to be encoded before the next is asked for


class Items:
    """Text in, changes out. `done` holds the items, the last of them open until `close`.

    Args:
        writer: finds the calls; None where there can be none.
    """

    def __init__(self, writer: CallWriter | None) -> None:
        self.done: list[Item] = []
        self._writer = writer
        self._scored: list[Any] = []  # logprobs of text that the writer holds back

    def push(self, text: str, logprobs: Sequence[Any] = (), ending: bool = False) -> Iterator[Change]:
        """New text with its logprobs. They go with the text that came with them, be it a call's in part."""
        self._scored += logprobs
        found: Sequence[Event] = [Content(text)] if text else []
        if self._writer is not None:
            found = self._writer.events(text, ending)
        for event in found:
            if isinstance(event, CallBegin):
                yield from self._close("completed")
                yield self._begin_call(event.name)
            elif not isinstance(event, Content):
                yield self._change("response.function_call_arguments.delta", delta=event.text)
                self.done[-1]["arguments"] += event.text
            elif event.text:
                yield from self._write(event.text)

    def close(self, status: str) -> Iterator[Change]:
        """Nothing follows; status: of the last item. Without any text there is an empty message."""
        if not self.done:
            yield from self._begin_message()
        yield from self._close(status)

    def _write(self, text: str) -> Iterator[Change]:
        if not self.done or self.done[-1]["type"] != "message":
            yield from self._close("completed")
            yield from self._begin_message()
        logprobs, self._scored = self._scored, []
        yield self._change("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)
        part = self.done[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs

    def _begin_message(self) -> Iterator[Change]:
        item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "status": "in_progress", "role": "assistant"}
        part: Item = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.done.append({**item, "content": [part]})
        yield self._item("added", {**item, "content": []})
        yield self._change("response.content_part.added", content_index=0, part=part)

    def _begin_call(self, name: str) -> Change:
        self._scored = []
        ids = {"id": f"fc_{uuid.uuid4().hex}", "call_id": f"call_{uuid.uuid4().hex[:24]}"}
        self.done.append({"type": "function_call", **ids, "name": name, "arguments": "", "status": "in_progress"})
        return self._item("added", self.done[-1])

    def _close(self, status: str) -> Iterator[Change]:
        if not self.done:
            return
        item = self.done[-1]
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            told = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._change("response.output_text.done", content_index=0, **told)
            yield self._change("response.content_part.done", content_index=0, part=part)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._change("response.function_call_arguments.done", **told)
        yield self._item("done", item)

    def _item(self, what: str, item: Item) -> Change:
        return f"response.output_item.{what}", {"output_index": len(self.done) - 1, "item": item}

    def _change(self, kind: str, **fields: Any) -> Change:
        return kind, {"item_id": self.done[-1]["id"], "output_index": len(self.done) - 1, **fields}
