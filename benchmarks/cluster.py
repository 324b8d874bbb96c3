"""What the ingress and Ray Serve add to one plain server: p50 TTFT, requests one after the other.

    python benchmarks/cluster.py [--requests 200] [--out benchmarks/results/cluster.json]

Both serve the built-in model with one thread. Requests alternate between the two, so that other load on the machine
hits both alike. Throughput is not compared: on a few cores client, ingress and engines share them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from server import stream

COMMAND = [sys.executable, "-m", "flover", "serve", "--port", "0", "--device", "cpu", "--num-threads", "1"]


def start(*options: str) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith("Flover serves"))
    return process, int(line.rpartition(":")[2])


async def measure(ports: list[int], count: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in ports]
    for _ in range(count):
        for port, mine in zip(ports, times):
            mine.append((await stream(port, "completions", 4))[1])
    return [one[count // 10 :] for one in times]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cluster.json")
    args = parser.parse_args()
    plain, plain_port = start()
    cluster, cluster_port = start("--replicas", "1", "--cpus", "0.5")
    try:
        one, other = asyncio.run(measure([plain_port, cluster_port], args.requests))
    finally:
        for process in (plain, cluster):
            process.terminate()
            process.wait()
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "cpus": os.cpu_count(),
        "requests": len(one),
        "plain_p50_ttft_ms": round(statistics.median(one) * 1e3, 2),
        "cluster_p50_ttft_ms": round(statistics.median(other) * 1e3, 2),
        "added_p50_ms": round((statistics.median(other) - statistics.median(one)) * 1e3, 2),
        "added_p90_ms": round((statistics.quantiles(other, n=10)[-1] - statistics.quantiles(one, n=10)[-1]) * 1e3, 2),
    }
    print(json.dumps(result))
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
