"""What handing a step's plan to the other ranks costs rank 0: microseconds of host time, and bytes. No model, no GPU.

    python benchmarks/plan_handover.py    # writes benchmarks/results/plan_handover.json

A real scheduler with 256 rows makes the plans; a process per rank reads them at the other end of a socket pair. Counted
is what a step has only because there are several ranks (digest, frame, a send to each), beside the encoding, which one
rank does too. "steady": every row decodes; "joins": the steps in which the 256 requests join, of at most 2,048 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from flover.bench.keep import provenance
from flover.config import KVConfig, SchedulerConfig
from flover.engine.batch import StepResult, encode_plan
from flover.engine.digest import RowDigest
from flover.engine.links import Link, Ranks
from flover.engine.scheduler import Scheduler
from flover.engine.wire import Connection, FromRank, Plan
from flover.kv.paged import PagedLayout
from flover.request import Request, RowSampling

BLOCK, PROMPT, OUTPUT = 16, 100, 400


def reader() -> Link:
    """A process that reads whatever it is sent."""
    mine, theirs = socket.socketpair()
    if not os.fork():
        mine.close()
        while theirs.recv(1 << 16):
            pass
        os._exit(0)
    theirs.close()
    return Link(1, Connection(mine, FromRank), None)


def measure(rows: int, ranks: int) -> dict[str, Any]:
    blocks = rows * (-(-(PROMPT + OUTPUT) // BLOCK) + 1)
    kv = KVConfig("paged", "move", BLOCK, blocks, "float32", 1024, True)
    scheduler = Scheduler(SchedulerConfig(rows, 2048, 1024), kv, PagedLayout(blocks, BLOCK), time.monotonic)
    group, digest = Ranks([reader() for _ in range(ranks - 1)]), RowDigest(rows)
    for i in range(rows):
        prompt = [(i * 7919 + j) % 32000 for j in range(PROMPT)]
        scheduler.add(Request(str(i), prompt, RowSampling(seed=i, temperature=0.8, top_p=0.9), OUTPUT))
    found: dict[str, list[tuple[float, float, int]]] = {"joins": [], "steady": []}
    number = 0
    while (step := scheduler.schedule()) is not None:
        started = time.perf_counter()
        data = encode_plan(step.plan)
        encoded = time.perf_counter()
        group.broadcast(Plan(number, digest.advance(step.plan), data))
        ended = time.perf_counter()
        if step.plan.num_rows == rows:
            kind = "joins" if step.plan.joins else "steady"
            found[kind].append(((encoded - started) * 1e6, (ended - encoded) * 1e6, len(data)))
        number += 1
        count = len(step.sampled)
        scheduler.update(step, StepResult(np.ones(count, dtype=np.int64), np.ones(count, dtype=np.bool_)))
        time.sleep(0.001)  # as long as a short step of the device
    group.close()
    return {kind: summary(values) for kind, values in found.items() if values}


def summary(values: list[tuple[float, float, int]]) -> dict[str, Any]:
    encode, hand_over, size = (np.array(column) for column in zip(*values))
    return {
        "steps": len(values),
        "encode_us": {"median": round(float(np.median(encode)), 1), "p99": round(float(np.percentile(encode, 99)), 1)},
        "hand_over_us": {
            "median": round(float(np.median(hand_over)), 1),
            "p99": round(float(np.percentile(hand_over, 99)), 1),
        },
        "bytes": {"median": int(np.median(size)), "most": int(size.max())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/plan_handover.json"))
    arguments = parser.parse_args()
    environment = provenance("cpu", script=True) | {"load": os.getloadavg()[0]}
    result: dict[str, Any] = {"environment": environment, "rows": arguments.rows}
    for ranks in (2, 4, 8):
        result[f"{ranks} ranks"] = measure(arguments.rows, ranks)
        print(ranks, "ranks:", json.dumps(result[f"{ranks} ranks"]))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
