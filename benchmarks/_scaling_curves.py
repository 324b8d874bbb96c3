"""Parts of scaling.py that use the fluid model: its check, routing and autoscaling, with their pictures."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _scaling_fit import model
from _scaling_fluid import Fluid, Load, Result, Scaling
from _scaling_routers import Router, least_loaded, power_of_two_choices, prefix_affinity, round_robin
from _scaling_rows import StepTable
from _scaling_virtual import serve

from flover.bench.figures.style import legend, panels, save
from flover.cluster.cost import Cost
from flover.cluster.hardware import DEVICES
from flover.cluster.policy import desired_replicas, homes

MAX_ROWS, BUDGET = 256, 2048
GROUPS, SHARED, CACHED = 2000, 1000, 60  # prefixes, their tokens, how many a replica's cache holds beside its rows


def cost() -> Cost:
    return Cost(model("llama3-8b"), DEVICES["h200"])


def table() -> StepTable:
    return StepTable(cost(), BUDGET, MAX_ROWS)


def make_load(count: int, rate: float, seed: int, prompt: float = 200, shared: float = 0) -> Load:
    """Poisson; prompts and outputs lognormal around 200 tokens; groups by Zipf's law with exponent 0.9."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, GROUPS + 1) ** 0.9
    return Load(
        np.cumsum(rng.exponential(1 / rate, count)),
        shared + np.clip(np.rint(rng.lognormal(np.log(prompt), 0.7, count)), 8, 2000),
        np.clip(np.rint(rng.lognormal(np.log(170), 0.7, count)), 2, 1500),
        rng.choice(GROUPS, count, p=weights / weights.sum()),
        shared,
    )


def summary(load: Load, result: Result) -> dict[str, float]:
    """ms, and requests/s of the middle 80 % of all arrivals."""
    count = len(load.arrival)
    middle = slice(count // 10, count - count // 10)
    ttft = (result.first - load.arrival)[middle] * 1e3
    tpot = ((result.last - result.first) / np.maximum(load.output - 1, 1))[middle] * 1e3
    e2e = (result.last - load.arrival)[middle] * 1e3
    return {
        "mean_ttft_ms": round(float(ttft.mean()), 2),
        "p50_ttft_ms": round(float(np.median(ttft)), 2),
        "p99_ttft_ms": round(float(np.percentile(ttft, 99)), 2),
        "mean_tpot_ms": round(float(tpot.mean()), 3),
        "mean_e2e_ms": round(float(e2e.mean()), 1),
        "makespan_s": round(float(result.last.max() - load.arrival[0]), 2),
    }


class Case(NamedTuple):
    """rate: requests/s a replica. prompt: median tokens. tick: seconds."""

    rate: int
    prompt: int = 200
    seed: int = 1
    tick: float = 0.02


CASES = (Case(10), Case(25), Case(50), Case(75), Case(18, prompt=1000, seed=2), Case(75, seed=3, tick=0.05))


def check(out: Path) -> dict[str, Any]:
    """Fluid model and real scheduler on the same 10^4 requests, 8 replicas, round robin."""
    rows, steps = [], table()
    for case in CASES:
        load = make_load(10_000, case.rate * 8, case.seed, case.prompt)
        fluid = Fluid(steps, MAX_ROWS, BUDGET, 8).run(load, round_robin(), case.tick)
        real = serve(steps, load, fluid.replica, MAX_ROWS, BUDGET, 600_000)
        ours, truth = summary(load, fluid), summary(load, real)
        error = {name: round(ours[name] / truth[name] - 1, 4) for name in truth}
        rows.append({**case._asdict(), "fluid": ours, "scheduler": truth, "error": error})
        print(rows[-1], flush=True)
    worst = max(abs(value) for row in rows for value in row["error"].values())
    return {"requests": 10_000, "replicas": 8, "max_abs_error": worst, "loads": rows}


# ---- routing ---------------------------------------------------------------------------------------------------------


POLICIES = ("round robin", "least loaded", "power of two", "prefix affinity + load")


def router(policy: str, replicas: int) -> Router:
    if policy == "prefix affinity + load":
        names = [str(i) for i in range(replicas)]
        return prefix_affinity([homes(str(group).encode(), names) for group in range(GROUPS)])
    return {"round robin": round_robin, "least loaded": least_loaded, "power of two": power_of_two_choices}[policy]()


def _routed(policy: str, replicas: int, count: int, rate: float) -> dict[str, Any]:
    load = make_load(count, rate * replicas, seed=2, shared=SHARED)
    began = time.perf_counter()
    tick = 0.05 if replicas > 100 else 0.02
    result = Fluid(table(), MAX_ROWS, BUDGET, replicas, CACHED).run(load, router(policy, replicas), tick)
    row = {"policy": policy, "replicas": replicas, "requests": count, "requests_per_s_per_replica": rate}
    row |= {"prefix_hits": round(result.hits, 3), **summary(load, result)}
    print(row, f"{time.perf_counter() - began:.1f} s", flush=True)
    return row


def routing(out: Path) -> dict[str, Any]:
    """Prompts of 1,000 shared tokens and about 250 of their own, 2,000 prefixes by Zipf: four policies."""
    curves = [_routed(p, 50, 25_000, rate) for p in POLICIES for rate in (10, 20, 30)]
    large = [_routed(p, 1000, 1_000_000, 20) for p in POLICIES]
    figure, (left, right, last) = panels(3, "Routing, fluid model of Llama-3-8B on one H200 each")
    for policy in POLICIES:
        mine = [row for row in curves if row["policy"] == policy]
        rates = [row["requests_per_s_per_replica"] for row in mine]
        left.plot(rates, [row["p50_ttft_ms"] for row in mine], marker="o", label=policy)
        right.plot(rates, [row["p99_ttft_ms"] for row in mine], marker="o", label=policy)
    for axes, name in ((left, "median"), (right, "99th percentile")):
        axes.set(xlabel="requests/s a replica (50 replicas)", ylabel="TTFT, ms", title=name)
    names = [f"{row['policy']}\n{row['prefix_hits']:.0%} hits" for row in large]
    last.barh(names, [row["p99_ttft_ms"] for row in large])
    last.set(title="1,000 replicas, 20/s each", xlabel="p99 TTFT, ms of $10^6$ requests")
    last.invert_yaxis()
    legend(figure, [left, right], 4)
    save(figure, out / "scaling_routing.png")
    return {"shared_tokens": SHARED, "prefixes": GROUPS, "cached_prefixes": CACHED, "curves": curves, "large": large}


# ---- autoscaling -----------------------------------------------------------------------------------------------------


def _day(most: int, seconds: float) -> Load:
    """A rate that rises and falls between 10 % and 90 % of `most` replicas' 60 requests/s, with a burst."""
    rng = np.random.default_rng(3)
    top = most * 60 * 0.9
    times = np.cumsum(rng.exponential(1 / top, int(top * seconds * 1.05)))
    times = times[times < seconds]
    share = 0.55 - 0.45 * np.cos(2 * np.pi * times / seconds)
    share = np.where((times > 0.8 * seconds) & (times < 0.85 * seconds), 1.0, share)
    times = times[rng.random(len(times)) < share]
    load = make_load(len(times), 1.0, seed=4)
    load.arrival = times
    return load


def _wanted(target: float, most: int, now: float, active: int, tokens: float, rows: float) -> int:
    return desired_replicas(active, tokens, rows, MAX_ROWS, target, 2, most)


def autoscaling(out: Path) -> dict[str, Any]:
    """The policy of `cluster.policy` over a day squeezed into 400 s, for replicas that start quickly or slowly."""
    most, seconds = 20, 400.0
    load, rows = _day(most, seconds), []
    figure, axes = panels(2, "Autoscaling on queue tokens, fluid model of Llama-3-8B on H200s")
    for start_up in (5, 20, 60):
        result = Fluid(table(), MAX_ROWS, BUDGET, most).run(
            load,
            least_loaded(),
            tick=0.05,
            scaling=Scaling(partial(_wanted, 4000, most), most, working=2, start_up=float(start_up)),
        )
        ttft = result.first - load.arrival
        trace = np.array(result.trace)
        row = {"start_up_s": start_up, "target_queued_tokens": 4000, "requests": len(load.arrival)}
        row |= {"mean_replicas": round(float(trace[:, 1].mean()), 2), "most_replicas": int(trace[:, 1].max())}
        row |= {f"p{q}_ttft_ms": round(float(np.percentile(ttft, q)) * 1e3, 1) for q in (50, 99)}
        row["over_1_s"] = round(float((ttft > 1).mean()), 4)
        rows.append(row)
        print(row, flush=True)
        axes[0].plot(trace[:, 0], trace[:, 1], label=f"start-up {start_up} s")
        edges = np.arange(0, seconds, 5)
        at = np.digitize(load.arrival, edges) - 1
        axes[1].plot(
            edges, [np.percentile(ttft[at == i], 99) * 1e3 for i in range(len(edges))], label=f"start-up {start_up} s"
        )
    rate = np.histogram(load.arrival, np.arange(0, seconds + 5, 5))[0] / 5
    axes[0].plot(np.arange(0, seconds, 5), rate / 60, "k:", label="requests/s / 60")
    axes[0].set(xlabel="seconds", ylabel="replicas", title="replicas that work")
    axes[1].set(xlabel="arrival, seconds", ylabel="p99 TTFT, ms", yscale="log", title="of arrivals in 5 s")
    legend(figure, axes)
    save(figure, out / "scaling_autoscaling.png")
    return {"max_replicas": most, "rows": rows}
