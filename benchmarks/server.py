"""Front cost of streaming: CPU time of the front's process (supervisor and engine have their own) per streamed token.

    python benchmarks/server.py [--streams 64] [--tokens 200] [--api chat|completions]

Prints one line of JSON. The clients are raw sockets in this process, so that they take little from the two others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from serving import load, serve

BODIES = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Who was Moses?"}]}),
    "completions": ("/v1/completions", {"prompt": "In the beginning"}),
}


async def stream(port: int, api: str, tokens: int) -> tuple[int, float]:
    """-> events with text, seconds to the first of them."""
    path, body = BODIES[api]
    data = json.dumps({**body, "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begin, first, count = time.monotonic(), 0.0, 0
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    while not (line := await reader.readline()).startswith(b"data: [DONE]"):
        assert line, "the connection ended early"
        if line.startswith(b"data: ") and b'"role"' not in line:
            count += 1
            first = first or time.monotonic() - begin
    writer.close()
    return count, first


async def measure(port: int, process: psutil.Process, args: argparse.Namespace) -> dict[str, object]:
    await asyncio.gather(*(stream(port, args.api, 8) for _ in range(4)))
    loads = load()
    before, begin = process.cpu_times(), time.monotonic()
    results = await asyncio.gather(*(stream(port, args.api, args.tokens) for _ in range(args.streams)))
    after, seconds = process.cpu_times(), time.monotonic() - begin
    total = args.streams * args.tokens
    cpu = after.user + after.system - before.user - before.system
    return {
        "api": args.api,
        "load_before": loads,
        "streams": args.streams,
        "tokens": total,
        "events": sum(count for count, _ in results),
        "tokens_per_second": round(total / seconds),
        "front_cpu_us_per_token": round(cpu / total * 1e6, 1),
        "ttft_median_ms": round(sorted(first for _, first in results)[len(results) // 2] * 1e3, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--api", choices=sorted(BODIES), default="chat")
    args = parser.parse_args()
    with serve("--device", "auto") as server:
        print(json.dumps(asyncio.run(measure(server.port, server.front, args))))


if __name__ == "__main__":
    main()
