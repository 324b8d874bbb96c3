"""What the ingress and Ray Serve add to one plain server: p50 TTFT, requests one after the other.

    python benchmarks/cluster.py [--requests 200] [--out benchmarks/results/cluster.json]

Both serve the built-in model with one thread. Requests alternate between the two, so that other load on the machine
hits both alike. Throughput is not compared: on a few cores client, ingress and engines share them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from pathlib import Path

from flover.bench.keep import provenance
from server import stream

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from serving import load, serve


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
    before = load()
    environment = provenance(None, script=True)
    with serve() as plain, serve("--replicas", "1", "--cpus", "0.5") as cluster:
        one, other = asyncio.run(measure([plain.port, cluster.port], args.requests))
    result = {
        "environment": environment,
        "load_before": before,
        "load_after": load(),
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
