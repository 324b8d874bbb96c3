"""What the server keeps under load: its capacity and five times that, many streams, many cancels, a body too large.

    python benchmarks/overload.py [--seconds 60] [--only overload,streams,cancels,body] [--output overload.json]

One server per part, the built-in model on one thread, clients over raw sockets in this process. Ratios hold
within a run; the load averages before and after say what else went on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from serving import Answer, Server, load, machine, percentile, request, serve

BODY = {"prompt": "And it came to pass", "max_tokens": 24, "ignore_eos": True, "stream": True, "temperature": 0}
ROWS, QUEUE = 16, 32


async def offered(port: int, rate: float, seconds: float, limit: float) -> dict[str, Any]:
    """Poisson arrivals of `rate` requests/s. Good: all tokens, the first within `limit` seconds."""
    chance, tasks = random.Random(1), []
    begin, at = time.monotonic(), 0.0
    while at < seconds:
        await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
        tasks.append(asyncio.create_task(request(port, "/v1/completions", BODY)))
        at += chance.expovariate(rate)
    answers: list[Answer] = await asyncio.gather(*tasks)
    span = max(answer.begin + answer.end for answer in answers) - begin
    accepted = [answer for answer in answers if answer.status == 200]
    good = [answer for answer in accepted if answer.first and answer.first <= limit and b"[DONE]" in answer.body]
    refused = [answer.end for answer in answers if answer.status == 429]
    return {
        "offered_per_second": round(len(answers) / seconds, 1),
        "answers": dict(Counter(f"{answer.status} {answer.code}".strip() for answer in answers)),
        "good_per_second": round(len(good) / span, 2),
        "ttft_p50_ms": round(1e3 * percentile([answer.first for answer in accepted], 0.5), 1),
        "ttft_p99_ms": round(1e3 * percentile([answer.first for answer in accepted], 0.99), 1),
        "rejection_p50_ms": round(1e3 * percentile(refused, 0.5), 1),
        "rejection_p99_ms": round(1e3 * percentile(refused, 0.99), 1),
        "retry_after": sorted({answer.headers.get("retry-after", "") for answer in answers if answer.status == 429}),
    }


async def closed(port: int, clients: int, seconds: float) -> float:
    """Requests/s of so many clients that ask again at once: the capacity."""
    count, begin = 0, time.monotonic()

    async def one() -> None:
        nonlocal count
        while time.monotonic() < begin + seconds:
            answer = await request(port, "/v1/completions", BODY)
            count += answer.status == 200

    await asyncio.gather(*(one() for _ in range(clients)))
    return count / (time.monotonic() - begin)


async def overload(server: Server, seconds: float) -> dict[str, Any]:
    await closed(server.port, ROWS, 3)
    capacity = await closed(server.port, ROWS, seconds / 4)
    limit = 3 * (ROWS + QUEUE) / capacity  # what a full queue takes to drain is QUEUE / capacity
    parts = {}
    for factor in (0.7, 1.0, 1.5, 5.0):
        parts[f"{factor}x"] = await offered(
            server.port, factor * capacity, seconds if factor == 5 else seconds / 4, limit
        )
    peak = max(part["good_per_second"] for part in parts.values())
    return {
        "capacity_per_second": round(capacity, 2),
        "ttft_limit_ms": round(1e3 * limit),
        "seconds_at_5x": seconds,
        "offered": parts,
        "goodput_at_5x_of_peak": round(parts["5.0x"]["good_per_second"] / peak, 3),
    }


async def streams(server: Server, count: int = 1000) -> dict[str, Any]:
    """So many streams open at once; each must come to its end."""
    begin = time.monotonic()
    answers = await asyncio.gather(
        *(request(server.port, "/v1/completions", {**BODY, "max_tokens": 8}) for _ in range(count))
    )
    whole = sum(answer.status == 200 and b"[DONE]" in answer.body for answer in answers)
    overlap = max(answer.begin for answer in answers) < min(answer.begin + answer.end for answer in answers)
    return {
        "streams": count,
        "whole": whole,
        "all_open_at_once": overlap,
        "seconds": round(time.monotonic() - begin, 1),
    }


async def cancels(server: Server, count: int = 1000) -> dict[str, Any]:
    """So many clients that go at a random moment, 50 at a time; then what is left."""
    chance, gate = random.Random(2), asyncio.Semaphore(50)

    async def one() -> None:
        async with gate:
            body = {**BODY, "max_tokens": 400, "n": chance.randint(1, 3), "stream": chance.random() < 0.5}
            await request(server.port, "/v1/completions", body, leave=0.05 + chance.random())

    await asyncio.gather(*(one() for _ in range(count)))
    await asyncio.sleep(1)
    total = server.metrics()
    left = {name: total[name] for name in ("num_requests_live", "num_requests_running", "num_requests_waiting")}
    aborted, accepted = total["request_aborted_total"], total["request_accepted_total"]
    return {
        "clients": count,
        "accepted": accepted,
        "aborted": aborted,
        **left,
        "kv_blocks_used": total["kv_blocks_used"],
    }


async def body(server: Server) -> dict[str, Any]:
    """A body of 27 MB, again and again, while /livez is asked."""
    data = json.dumps({"prompt": "a" * 27_000_000}).encode()
    waits: list[float] = []
    statuses: Counter[int] = Counter()

    def alive() -> None:
        """On a thread: this process's own event loop is busy with the bodies."""
        while not big.done():
            begin = time.monotonic()
            assert server.get("/livez")
            waits.append(time.monotonic() - begin)
            time.sleep(0.005)

    async def send() -> None:
        for _ in range(20):
            statuses[(await request(server.port, "/v1/completions", data)).status] += 1

    big = asyncio.create_task(send())
    await asyncio.gather(big, asyncio.to_thread(alive))
    return {
        "bytes": len(data),
        "answers": dict(statuses),
        "livez_asked": len(waits),
        "livez_p50_ms": round(1e3 * percentile(waits, 0.5), 1),
        "livez_p99_ms": round(1e3 * percentile(waits, 0.99), 1),
    }


PARTS = {
    "overload": (("--max-num-seqs", str(ROWS), "--max-queued-requests", str(QUEUE)), overload),
    "streams": (("--max-num-seqs", "64"), streams),
    "cancels": (("--max-num-seqs", str(ROWS), "--max-queued-requests", "10000"), cancels),
    "body": ((), body),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine()}
    if args.output and args.output.exists():
        result = json.loads(args.output.read_text())
    for name in args.only.split(","):
        options, part = PARTS[name]
        before = load()
        with serve(*options) as server:
            measured = asyncio.run(part(server, args.seconds) if part is overload else part(server))  # type: ignore[arg-type, operator]
        result[name] = {"load_before": before, "load_after": load(), **measured}
        print(name, json.dumps(result[name], indent=1), flush=True)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
