"""How `flover generate` shows what it does: live blocks on a terminal, plain text elsewhere, a bar beside a file.

Model output is data: on a terminal control characters are made visible, never sent.
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from flover.llm import progress
from flover.metrics import PALETTE
from flover.request import CompletionOutput, RequestOutput

if TYPE_CHECKING:
    from typing_extensions import Self

REFRESH = 0.08  # seconds between two pictures


class Display(Protocol):
    """Shows outputs as they grow."""

    def show(self, output: RequestOutput) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


def make_display(ids: Sequence[str], to_file: bool) -> Display:
    """The one that fits: `ids` in the order of the input."""
    if to_file:
        return Bar(len(ids))
    if not Console().is_terminal:
        return Plain(ids)
    return Single() if len(ids) == 1 else Blocks(ids)


def visible(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def ending(choice: CompletionOutput) -> str:
    """Why a choice ended, for people."""
    if choice.error:
        return f"error: {choice.error}"
    detail = f" at {choice.stop_reason!r}" if choice.stop_reason is not None else ""
    return f"{choice.finish_reason}{detail}"


class Plain:
    """Each finished text with its id, in the order of the input; one prompt alone is the bare text."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids, self._next = list(ids), 0
        self._done: dict[str, RequestOutput] = {}

    def show(self, output: RequestOutput) -> None:
        if output.finished:
            self._done[output.request_id] = output
        while self._next < len(self._ids) and self._ids[self._next] in self._done:
            self._print(self._done.pop(self._ids[self._next]))
            self._next += 1

    def _print(self, output: RequestOutput) -> None:
        for choice in output.outputs:
            if len(self._ids) == 1:
                print(choice.text if choice.text or not choice.token_ids else choice.token_ids, flush=True)
                continue
            name = output.request_id + (f"#{choice.index}" if len(output.outputs) > 1 else "")
            text = (output.prompt or "") + choice.text if output.prompt or choice.text else str(choice.token_ids)
            print(f"[{name}] {text}", flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Single:
    """One prompt on a terminal: its text as it comes. Several choices follow one another."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._choice, self._printed = -1, 0

    def show(self, output: RequestOutput) -> None:
        while True:
            if self._choice < 0:
                self._begin(output)
            choice = output.outputs[self._choice]
            text = choice.text or ("" if not choice.finish_reason or not choice.token_ids else str(choice.token_ids))
            self._console.print(Text(visible(text[self._printed :])), end="", soft_wrap=True)
            self._printed = len(text)
            if choice.finish_reason is None or self._choice + 1 == len(output.outputs):
                return
            self._begin(output)

    def _begin(self, output: RequestOutput) -> None:
        self._choice, self._printed = self._choice + 1, 0
        start = "\n\n" if self._choice else ""
        self._console.print(start, Text(visible(output.prompt or ""), style="bold"), sep="", end="", soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._console.print()


class Blocks:
    """Several prompts on a terminal: what runs in a live block of few lines each, what is done in full above it."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._console = Console(highlight=False)
        self._colors = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(ids)}
        self._total, self._done, self._tokens = len(ids), 0, 0
        self._running: dict[str, RequestOutput] = {}
        self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._begin = self._last = time.monotonic()

    def show(self, output: RequestOutput) -> None:
        self._running[output.request_id] = output
        if output.finished:
            del self._running[output.request_id]
            self._done += 1
            self._tokens += sum(len(choice.token_ids) for choice in output.outputs)
            for choice in output.outputs:
                self._console.print(self._finished(output, choice))
        now = time.monotonic()
        if output.finished or now - self._last > REFRESH:
            self._last = now
            self._live.update(self._picture(), refresh=True)

    def _label(self, output: RequestOutput, mark: str) -> Text:
        return Text(f"{mark} {visible(output.request_id)} ", style=f"bold {self._colors[output.request_id]}")

    def _finished(self, output: RequestOutput, choice: CompletionOutput) -> Text:
        text = choice.text or str(choice.token_ids)
        note = f"  [{len(choice.token_ids)} tokens, {ending(choice)}]"
        prompt, color = visible(output.prompt or ""), self._colors[output.request_id]
        return self._label(output, "■") + Text.assemble((prompt, "bold"), (visible(text), color), (note, "dim"))

    def _picture(self) -> Group:
        height, width = self._console.height - 3, self._console.width - 1
        lines = max(1, min(4, height // max(len(self._running), 1)))
        shown = list(self._running.values())[: max(height // lines, 1)]
        blocks = [self._block(output, lines, width) for output in shown]
        tokens = self._tokens + sum(len(c.token_ids) for output in self._running.values() for c in output.outputs)
        rate = tokens / max(time.monotonic() - self._begin, 1e-3)
        hidden = f", {len(self._running) - len(shown)} not shown" if len(shown) < len(self._running) else ""
        status = f"{self._done} of {self._total} done, {len(self._running)} in the batch{hidden}, {rate:.0f} tokens/s"
        return Group(*blocks, Text(status, style="dim"))

    def _block(self, output: RequestOutput, lines: int, width: int) -> Text:
        """The end of prompt and text, cut to the lines that it has."""
        label = self._label(output, "▶")
        choice = output.outputs[0]
        prompt = re.sub(r"\s+", " ", visible(output.prompt or ""))
        text = re.sub(r"\s+", " ", visible(choice.text or str(choice.token_ids)))
        room = lines * width - label.cell_len - 2
        extra = len(prompt) + len(text) - room
        if extra > 0:
            prompt, text = prompt[extra:], text[max(0, extra - len(prompt)) :]
            label.append("…")
        return label + Text.assemble((prompt, "bold"), (text, self._colors[output.request_id]))

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.update(Text(""))
        self._live.stop()


class Bar:
    """A progress bar on stderr, if that is a terminal."""

    def __init__(self, total: int) -> None:
        self._progress = progress(total)

    def show(self, output: RequestOutput) -> None:
        if output.finished:
            self._advance(sum(len(choice.token_ids) for choice in output.outputs))

    def __enter__(self) -> Self:
        self._advance = self._progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.__exit__(None, None, None)
