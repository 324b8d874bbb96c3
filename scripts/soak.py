"""Soak: mixed load, cancels and kills, then a look at what is left. `make soak`, or

    python scripts/soak.py [--minutes 10] [--clients 16] [--output soak.json]

In the first third the engine is killed and stopped, and the front is killed. In the rest nothing is, and the growth of
memory, descriptors and threads is measured. Exit code 1 if a promise did not hold; the JSON says which.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from serving import Answer, Server, load, machine, request, serve

MAX_SLOPE = 1.0  # MB per minute
GOOD = {200, 400, 413, 429, 503, 504}
WORDS = "In the beginning God created the heaven and the earth and the spirit moved upon the waters".split()  # noqa: SIM905


def body(chance: random.Random) -> tuple[str, dict[str, Any] | bytes, float | None]:
    """Path, body and when to go away, of a random request."""
    text = " ".join(chance.choices(WORDS, k=chance.choice((3, 10, 40, 150))))
    base: dict[str, Any] = {"max_tokens": chance.randint(1, 80), "stream": chance.random() < 0.6}
    leave = 0.02 + chance.random() if chance.random() < 0.25 else None
    kind = chance.random()
    if kind < 0.05:
        return "/v1/completions", b"{" * 50 if chance.random() < 0.5 else b'{"prompt": "a", "n": -1}', None
    if kind < 0.08:
        return "/v1/completions", json.dumps({"prompt": "a" * 9_000_000}).encode(), None
    if kind < 0.13:
        base["timeout"] = 0.01 + 0.2 * chance.random()
    if kind < 0.25:
        base["n"] = chance.randint(2, 4)
    if kind < 0.35:
        base.update(stop=[" the"], logprobs=2) if kind < 0.3 else base.update(seed=chance.randint(0, 9), top_k=5)
    if chance.random() < 0.5:
        base.pop("logprobs", None)
        return "/v1/chat/completions", {**base, "messages": [{"role": "user", "content": text}]}, leave
    return "/v1/completions", {**base, "prompt": text}, leave


class Soak:
    def __init__(self, server: Server, seconds: float, clients: int) -> None:
        self.server, self.seconds, self.clients = server, seconds, clients
        self.begin = time.monotonic()
        self.statuses: Counter[str] = Counter()
        self.broken: list[str] = []  # promises that did not hold
        self.kills: list[str] = []
        self.killing = 0.0  # until when answers may be reset
        self.samples: list[tuple[float, dict[str, list[float]]]] = []

    def now(self) -> float:
        return time.monotonic() - self.begin

    async def client(self, seed: int) -> None:
        chance = random.Random(seed)
        while self.now() < self.seconds:
            path, data, leave = body(chance)
            started = self.now()
            answer = await request(self.server.port, path, data, leave)
            self.judge(answer, isinstance(data, dict) and bool(data.get("stream")), started)
            await asyncio.sleep(0.3 * chance.random())

    def judge(self, answer: Answer, stream: bool, started: float) -> None:
        name = "gone" if answer.gone else f"{answer.status} {answer.code}".strip()
        self.statuses[name] += 1
        if answer.gone or (started < self.killing and answer.status in (0, 200)):
            return
        if answer.status not in GOOD or (answer.status == 200 and stream and b"[DONE]" not in answer.body):
            self.broken.append(f"{self.now():.0f} s: {name} {answer.body[-200:]!r}")

    async def kill(self, what: str, act: Callable[[], None]) -> None:
        self.killing = float("inf")
        self.kills.append(f"{self.now():.0f} s: {what}")
        begin, before = time.monotonic(), self.server.engine.pid
        act()
        while not await asyncio.to_thread(self.renewed, before):
            if time.monotonic() - begin > 60:
                self.broken.append(f"not ready 60 s after {what}")
                break
            await asyncio.sleep(0.2)
        self.kills[-1] += f", ready after {time.monotonic() - begin:.1f} s"
        await asyncio.sleep(1)
        self.killing = self.now()

    def renewed(self, before: int) -> bool:
        """Ready, with another engine."""
        try:
            return self.server.engine.pid != before and self.server.ready()
        except (IndexError, psutil.Error):
            return False

    async def kill_all(self) -> None:
        server, third = self.server, self.seconds / 3
        await asyncio.sleep(third / 6)
        await self.kill("SIGKILL of the engine", lambda: server.engine.kill())
        await asyncio.sleep(third / 6)
        await self.kill("SIGSTOP of the engine", lambda: server.engine.suspend())
        await asyncio.sleep(third / 6)
        await self.kill("SIGKILL of the front", lambda: server.front.kill())

    async def watch(self) -> None:
        """Every two seconds: the books, and what the processes hold."""
        while self.now() < self.seconds:
            await asyncio.sleep(2)
            try:
                total = await asyncio.to_thread(self.server.metrics)
                self.check_books(total)
                self.samples.append((self.now(), self.held()))
            except (OSError, IndexError, psutil.Error):
                if self.now() > self.killing:
                    self.broken.append(f"{self.now():.0f} s: no scrape")

    def check_books(self, total: dict[str, float]) -> None:
        ended = sum(total[f"request_{kind}_total"] for kind in ("success", "aborted", "failed"))
        if total["request_accepted_total"] != ended + total["num_requests_live"]:
            self.broken.append(f"{self.now():.0f} s: the books do not add up: {total}")

    def held(self) -> dict[str, list[float]]:
        supervisor = psutil.Process(self.server.process.pid)
        each = {"supervisor": supervisor, "front": self.server.front, "engine": self.server.engine}
        return {name: [p.memory_info().rss / 1e6, p.num_fds(), p.num_threads()] for name, p in each.items()}

    async def run(self) -> dict[str, Any]:
        for _ in range(8):
            await request(self.server.port, "/v1/completions", {"prompt": "And", "max_tokens": 4})
        await asyncio.gather(self.watch(), self.kill_all(), *(self.client(seed) for seed in range(self.clients)))
        end = {}
        for _ in range(50):  # idle: everything goes back
            await asyncio.sleep(0.2)
            end = self.server.metrics()
            if not end["num_requests_live"] and not end["kv_blocks_used"]:
                break
        self.check_books(end)
        for name in (
            "num_requests_live",
            "num_requests_running",
            "num_requests_waiting",
            "queue_tokens",
            "kv_blocks_used",
        ):
            if end[name]:
                self.broken.append(f"at the end {name} is {end[name]:g}")
        return self.report(self.held())

    def report(self, idle: dict[str, list[float]]) -> dict[str, Any]:
        warm = 0.45 * self.seconds
        steady = [(at, held) for at, held in self.samples if at > warm]
        processes = {}
        for name, (rss, fds, threads) in idle.items():
            at = [at / 60 for at, _ in steady]
            slope = float(np.polyfit(at, [held[name][0] for _, held in steady], 1)[0])
            counts = [held[name][2] for _, held in steady]
            processes[name] = {
                "rss_mb": round(rss, 1),
                "rss_mb_over_time": [
                    round(held[name][0]) for _, held in self.samples[:: max(1, len(self.samples) // 20)]
                ],
                "rss_slope_mb_per_minute": round(slope, 3),
                "descriptors_idle": fds,
                "threads_idle": threads,
                "threads_steady": [min(counts), max(counts)],
            }
            if slope > MAX_SLOPE:
                self.broken.append(f"the {name} grows by {slope:.2f} MB a minute")
            if min(counts) != max(counts):
                self.broken.append(f"the {name} had {min(counts):g} to {max(counts):g} threads")
        return {
            "machine": machine(),
            "seconds": round(self.seconds),
            "clients": self.clients,
            "answers": dict(sorted(self.statuses.items())),
            "kills": self.kills,
            "steady_seconds": round(self.seconds - warm),
            "processes": processes,
            "broken": self.broken[:20],
            "ok": not self.broken,
        }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    before = load()
    options = ("--max-num-seqs", "12", "--num-kv-blocks", "400", "--max-queued-requests", "12")
    with serve(*options, "--engine-iteration-timeout", "8") as server:
        baseline = server.front.num_fds()
        result = asyncio.run(Soak(server, 60 * args.minutes, args.clients).run())
        grown = server.front.num_fds() - baseline
        if grown > 2:
            result["broken"].append(f"the front holds {grown} more descriptors than at its start")
            result["ok"] = False
    result["machine"]["load_before"] = before
    text = json.dumps(result, indent=1)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
