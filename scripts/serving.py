"""What soak.py and benchmarks share: a server process, and requests over raw sockets that cost little."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

SERVE = "import sys; from flover.__main__ import main; sys.argv[0] = 'flover'; sys.exit(main())"


class Server:
    """A running `flover serve`; supervisor, front, engine."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    @property
    def front(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]

    @property
    def engine(self) -> psutil.Process:
        return self.front.children()[0]

    def get(self, path: str, timeout: float = 10) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout) as response:
            return bytes(response.read())

    def metrics(self) -> dict[str, float]:
        """By name without prefix; labelled series also summed under the bare name."""
        total: dict[str, float] = {}
        for line in self.get("/metrics").decode().splitlines():
            if not line.startswith("#"):
                series, value = line.rsplit(" ", 1)
                name = series.partition("{")[0].removeprefix("flover:")
                total[name] = total.get(name, 0.0) + float(value)
                if 'state="' in series:
                    total[f"{name}_{series.split('state=')[1].strip('}').strip(chr(34))}"] = float(value)
        return total

    def ready(self) -> bool:
        try:
            return bool(self.get("/readyz", 2))
        except OSError:
            return False


@contextmanager
def serve(*options: str, usual: Sequence[str] = ("--device", "cpu", "--num-threads", "1")) -> Iterator[Server]:
    command = [sys.executable, "-c", SERVE, "serve", "--port", "0", "--admin-socket", "none", *usual, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("Flover serves"))  # Ray may say something first
        yield Server(process, int(line.rpartition(":")[2]))
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(slots=True)
class Answer:
    """What came of a request. Times are seconds from its beginning; status 0: the connection was refused or reset."""

    begin: float
    status: int = 0
    body: bytes = b""
    first: float = 0.0  # first event with text
    end: float = 0.0
    gone: bool = False  # this client went away
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """Of its error, if it has one."""
        _, found, rest = self.body.partition(b'"code":"')
        return rest.split(b'"', 1)[0].decode() if found else ""


async def request(port: int, path: str, body: dict[str, Any] | bytes, leave: float | None = None) -> Answer:
    """POST. leave: seconds after which the client goes away."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = Answer(time.monotonic())
    try:
        async with asyncio.timeout(leave):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
            try:
                head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
                writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
                answer.status = int((await reader.readline()).split()[1])
                while line := (await reader.readline()).strip():
                    name, _, value = line.decode().partition(":")
                    answer.headers[name.lower()] = value.strip()
                parts = []
                while part := await reader.read(1 << 16):
                    if not answer.first and b'"text":"' in part:
                        answer.first = time.monotonic() - answer.begin
                    parts.append(part)
                answer.body = b"".join(parts)
            finally:
                writer.transport.abort() if leave is not None else writer.close()
    except (TimeoutError, asyncio.TimeoutError):
        answer.gone = True
    except (OSError, IndexError, ValueError, asyncio.IncompleteReadError):
        answer.status = 0
    answer.end = time.monotonic() - answer.begin
    return answer


def machine() -> dict[str, Any]:
    """Where, and beside what load, a figure was taken."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpu": name, "cores": os.cpu_count(), "python": platform.python_version(), "load": load()}


def load() -> list[float]:
    """Load averages of 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else 0.0
