"""Fits the efficiency factors of the cost model to measured steps, and says what is left."""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from _gpu_engine import MODELS
from scipy.optimize import least_squares

from flover.cluster.cost import Cost, ModelCost
from flover.cluster.hardware import DEVICES, Efficiency
from flover.cluster.model import model_cost
from flover.config import EngineConfig

RESULTS = Path(__file__).parent / "results"
CONTEXT = 264  # mean of a decode benchmark: prompts of 128, tokens 16 to 256
SCALES = {"layer": 1e-6, "row": 1e-6}
START = {"weights": 0.88, "flops": 0.72, "softness": 2, "layer": 3, "row": 2, "kv": 0.87, "eight_bit": 0.7}
LOW = {"weights": 0.5, "flops": 0.4, "softness": 1, "layer": 0, "row": 0, "kv": 0.7, "eight_bit": 0.3}
HIGH = {"weights": 1, "flops": 1, "softness": 8, "layer": 20, "row": 20, "kv": 0.9, "eight_bit": 1}
FP8 = {"quantization": "fp8_w8a8", "kv_cache_dtype": "fp8"}
PROFILED = [(1, 667, 4.263), (128, 672, 7.787), (256, 672, 12.34), (512, 672, 23.04)]  # profile_llama3-8b.txt


class Point(NamedTuple):
    """rows 0: a prompt of `context` tokens."""

    name: str
    rows: int
    context: int
    ms: float
    fitted: bool


def model(name: str, **options: Any) -> ModelCost:
    """A model of the GPU benchmarks by its shape."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**MODELS[name], "dtype": "bfloat16"}))
        return model_cost(EngineConfig(folder, **options))[1]


def _points() -> list[Point]:
    def decode(name: str, file: str, fitted: bool, most: int = 1 << 20) -> list[Point]:
        rows = json.loads((RESULTS / f"gpu_{file}.json").read_text())["decode"]
        return [Point(name, r["batch"], CONTEXT, r["ms"], fitted and r["batch"] <= most) for r in rows]

    points = decode("llama3-8b", "llama3-8b", True) + [Point("llama3-8b", *row, True) for row in PROFILED]
    for row in json.loads((RESULTS / "gpu_llama3-8b.json").read_text())["prefill"]:
        points.append(Point("llama3-8b", 0, row["length"], row["ms"] / row["prompts"], True))
    points += decode("gpt2-xl", "gpt2-xl", True, most=1)
    points += decode("llama3-8b fp8", "llama3-8b_fp8", True)
    return points + decode("gptj-6b", "gptj-6b", False) + decode("llama2-7b", "llama2-7b", False)


def calibrate(out: Path) -> dict[str, Any]:
    """Fit, compare, and compare what the package ships with what was fitted."""
    models = {name: model(name) for name in ("llama3-8b", "gpt2-xl", "gptj-6b", "llama2-7b")}
    models["llama3-8b fp8"] = model("llama3-8b", **FP8)
    points = _points()

    def predict(point: Point, efficiency: Efficiency) -> float:
        cost = Cost(models[point.name], replace(DEVICES["h200"], efficiency=efficiency))
        seconds = cost.decode(point.rows, point.context) if point.rows else cost.prefill(point.context, 8192)
        return seconds * 1e3

    def efficiency(values: Any) -> Efficiency:
        return Efficiency(**{name: float(v) * SCALES.get(name, 1) for name, v in zip(START, values)})

    seen = [point for point in points if point.fitted]
    fit = least_squares(
        lambda values: [predict(p, efficiency(values)) / p.ms - 1 for p in seen],
        list(START.values()),
        bounds=(list(LOW.values()), list(HIGH.values())),
    )
    rows = []
    for point in points:
        predicted = predict(point, Efficiency())
        rows.append(
            {**point._asdict(), "predicted_ms": round(predicted, 3), "error": round(predicted / point.ms - 1, 3)}
        )
        print(rows[-1])
    unseen = [abs(row["error"]) for row in rows if row["name"] in ("gptj-6b", "llama2-7b")]
    return {
        "machine": "one NVIDIA H200; measured by benchmarks/gpu.py and flover profile, see the files beside this one",
        "fitted": {name: float(f"{v * SCALES.get(name, 1):.4g}") for name, v in zip(START, fit.x)},
        "shipped": {name: getattr(Efficiency(), name) for name in START},
        "mean_abs_error_fitted": round(statistics.fmean(abs(r["error"]) for r in rows if r["fitted"]), 4),
        "mean_abs_error_unseen": round(statistics.fmean(unseen), 4),
        "max_abs_error_unseen": max(unseen),
        "points": rows,
    }
