"""Replicas for tests: commands in processes of their own, and streams that are read on threads."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx

LONG = {"prompt": "And it came to pass", "max_tokens": 900, "ignore_eos": True, "stream": True, "temperature": 0}
SMALL = ("--device", "cpu", "--num-threads", "1", "--drain-timeout", "20")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "flover", *words]


@contextlib.contextmanager
def running(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A command that says `Flover serves ... at URL`; -> it, URL."""
    process = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("Flover serves")), "")
        assert line, "it did not start"
        yield process, line.split()[-1]
    finally:
        process.terminate()
        process.wait(60)


class Stream(threading.Thread):
    """A streamed request, read on a thread."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.url, self.body, self.events = url, body, list[str]()
        self.started = threading.Event()
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", f"{self.url}/v1/completions", json=self.body, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
                    self.started.set()

    def ending(self) -> str:
        """Its finish reason, or its error's code."""
        self.join(120)
        assert self.events[-1] == "[DONE]"
        last = json.loads(self.events[-2])
        return str(last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"])

    def text(self) -> str:
        """Of an answer that is whole."""
        assert self.ending() == "length"
        return "".join(json.loads(event)["choices"][0]["text"] for event in self.events[:-1])
