"""The cost model's steps and sums by the number of ranks, beside those that benchmarks/ranks.py has measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from _scaling_fit import CONTEXT, RESULTS, model

from flover.cluster.cost import Cost, ModelCost
from flover.cluster.hardware import DEVICES, Device


def _device(gpu: str) -> Device:
    """By the name that CUDA gives; ValueError if there is no datasheet of it."""
    for name, device in DEVICES.items():
        if name.upper() in gpu:
            return device
    raise ValueError(f"no hardware of `flover plan` is {gpu!r}; there are {', '.join(DEVICES)}")


def _compared(predicted: float, measured: float, unit: str) -> dict[str, float]:
    return {
        unit: measured,
        f"predicted_{unit}": round(predicted, 3),
        "error": round(predicted / measured - 1, 3),
    }


def _decode(data: dict[str, Any], shape: ModelCost, device: Device) -> list[dict[str, Any]]:
    """Steps at each number of ranks, and what they gain over the fewest."""
    rows = []
    for ranks, steps in data["decode"].items():
        cost = Cost(shape, device, int(ranks))
        fewest = Cost(shape, device, min(map(int, data["decode"])))
        for step in steps:
            seconds = cost.decode(step["batch"], CONTEXT)
            row = {"ranks": int(ranks), "rows": step["batch"], **_compared(seconds * 1e3, step["ms"], "ms")}
            row["speed_up"] = step["speed_up"]
            row["predicted_speed_up"] = round(fewest.decode(step["batch"], CONTEXT) / seconds, 3)
            rows.append(row)
            print(row, flush=True)
    return rows


def _sums(data: dict[str, Any], shape: ModelCost, device: Device) -> list[dict[str, Any]]:
    """A sum over all ranks, by whatever was quicker."""
    ranks = max(map(int, data["decode"]))
    cost, rows = Cost(shape, device, ranks), []
    for one in data.get("sums", ()):
        measured = min(one[name] for name in ("nccl_us", "one_shot_us") if name in one)
        rows.append({"ranks": ranks, "bytes": one["bytes"]})
        rows[-1] |= _compared(cost.all_reduce(one["bytes"]) * 1e6, measured, "us")
        print(rows[-1], flush=True)
    return rows


def ranks(out: Path) -> list[dict[str, Any]]:
    """Of each machine with several GPUs that has a file; of none without one."""
    results = []
    for path in sorted(RESULTS.glob("gpu_tp*.json")):
        data = json.loads(path.read_text())
        shape, device = model(data["model"]), _device(data["environment"]["gpu"])
        rows = _decode(data, shape, device)
        errors = {n: [abs(row["error"]) for row in rows if row["ranks"] == n] for n in {row["ranks"] for row in rows}}
        results.append(
            {
                "file": path.name,
                "gpu": data["environment"]["gpu"],
                "model": data["model"],
                "mean_abs_error": {str(n): round(statistics.fmean(errors[n]), 4) for n in sorted(errors)},
                "decode": rows,
                "sums": _sums(data, shape, device),
            }
        )
    return results
