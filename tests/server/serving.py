"""One server process for the tests of a module: `serve(...)` starts `flover serve` on a free port and waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest

CODE = "import sys; from flover.cli import main; sys.exit(main(sys.argv[1:]))"


class Server:
    """A running `flover serve`."""

    def __init__(self, process: subprocess.Popen[str], url: str, key: str) -> None:
        self.process, self.url = process, url
        self.port = int(url.rpartition(":")[2])
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=30)

    @property
    def front(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    @property
    def engine(self) -> psutil.Process:
        (child,) = self.front.children()
        return child

    def metric(self, name: str) -> float:
        """Summed over its labels."""
        lines = [line.split() for line in self.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        values = [float(value) for series, value in lines if series.partition("{")[0] == f"flover:{name}"]
        assert values, name
        return sum(values)

    def check_conservation(self) -> None:
        text = self.http.get("/metrics").text
        lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
        total: dict[str, float] = {}
        for series, value in lines:
            name = series.partition("{")[0].removeprefix("flover:")
            total[name] = total.get(name, 0.0) + float(value)
        ended = total["request_success_total"] + total["request_aborted_total"] + total["request_failed_total"]
        assert total["request_accepted_total"] == ended + total["num_requests_live"]


@contextmanager
def serve(*options: str, key: str = "", env: dict[str, str] | None = None) -> Iterator[Server]:
    command = [sys.executable, "-c", CODE, "serve", "--port", "0", "--device", "cpu", "--num-threads", "1", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            assert process.stderr is not None
            pytest.fail(f"the server did not start: {process.stderr.read()}")
        server = Server(process, line.split()[-1], key)
        with server.http:
            yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def chat(content: str = "Who was Moses?", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **more}
