"""`flover profile`: where a model's steps spend their time, beside what the machine could do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler writes to stderr that it starts and stops

import torch

from flover.anatomy import ATTENTION, OTHER, PRODUCT, TRANSFER, Row, short_name
from flover.bench.keep import check_output, write_json
from flover.bound import Bound, Limits, measured_limits
from flover.config import EngineConfig, human
from flover.engine.engine import EngineCore, survey
from flover.profile import Profile, decode_steps, environment, num_outputs, profile_decode, profile_prefill
from flover.resolve import effective_dtype, resolve

WIDTH, NAME = 80, 36  # columns
KERNELS = 16  # rows of the table; the file has them all
KINDS = {PRODUCT: "matrix products", ATTENTION: "attention", OTHER: "everything else", TRANSFER: "host transfers"}


def run_profile(
    batches: str, context: int, steps: int, prefill: int | None, output: Path | None, options: Mapping[str, Any]
) -> int:
    """Measure, print, and write JSON if asked."""
    sizes = _sizes(batches)
    for name, value in (("context", context), ("steps", steps), ("prefill", prefill)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    check_output(output, "--output")
    config = EngineConfig(**options)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    _, model, hardware, weights = survey(config)
    longest = resolve(config, model, hardware, weights).scheduler  # an engine's may be smaller, and is checked again
    for batch in sizes:
        num_outputs(longest, batch, context, decode_steps(steps))
    if prefill is not None and prefill >= longest.max_model_len:
        raise ValueError(f"--prefill must be below max_model_len={longest.max_model_len}, got {prefill}")
    device = hardware.device
    dtype = effective_dtype(config, model, device)
    console = Console(highlight=False, width=WIDTH)
    console.print(f"{config.model} ({model.architecture}), {dtype} on {device}")
    limits = measured_limits(device, getattr(torch, dtype))
    core = EngineCore(config)
    try:
        bound = Bound(core, limits)
        _print_limits(console, bound)
        profiles = []
        for batch in sizes:
            profiles.append(profile_decode(core, bound, batch, context, steps))
            _print(console, profiles[-1], limits)
        if prefill is not None:
            profiles.append(profile_prefill(core, bound, prefill))
            _print(console, profiles[-1], limits)
    finally:
        core.shutdown()
    if output is not None:
        result = {
            "environment": environment(device),
            "model": config.model,
            "settings": {s.name: s.value for s in core.resolved.settings},
            "measured_TB_per_s": limits.bandwidth / 1e12,
            "measured_TFLOP_per_s": limits.flops / 1e12,
            "weight_bytes": bound.weight_bytes,
            "profiles": [profile.to_json() for profile in profiles],
        }
        write_json(output, result)
        console.print(f"\nwritten: {output}", soft_wrap=True)
    return 0


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ValueError(f"--batch must be numbers of rows, such as 1,32; got {text!r}")
    return sizes


def _print_limits(console: Console, bound: Bound) -> None:
    console.print(
        f"measured: {_rate(bound.limits.bandwidth, 'B/s')} of a sum, {_rate(bound.limits.flops, 'FLOP/s')} of a product"
    )
    console.print(f"a step reads {human(bound.weight_bytes)} of weights and {human(sum(bound.kv_bytes))} a token of KV")


def _rate(value: float, unit: str) -> str:
    return f"{value / 1e12:.2f} T{unit}" if value >= 1e12 else f"{value / 1e9:.1f} G{unit}"


def _print(console: Console, profile: Profile, limits: Limits) -> None:
    """A headline, the table of kernels, and what is not a kernel."""
    found, decode = profile.anatomy, profile.phase == "decode"
    rows = f"decode, batch {profile.batch}, context {profile.context:.0f}"
    console.print()
    console.print(
        f"{rows if decode else f'prefill, {profile.context:.0f} tokens'}: {profile.step_ms:.3f} ms,"
        f" bound {profile.bound_ms:.3f} ms ({profile.share_of_bound:.1%} of it)",
        style="bold",
    )
    unit, scale = ("T", 1.0) if limits.bandwidth >= 1e12 else ("G", 1e3)
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("kernel", width=NAME, no_wrap=True)
    for column, width in (("launches", 8), ("us", 9), ("share", 6), (f"{unit}B/s", 6), (f"{unit}FLOP/s", 7)):
        table.add_column(column, width=width, justify="right", no_wrap=True)
    for row in found.kernels[:KERNELS]:
        table.add_row(short_name(row.name, NAME), *_cells(row, scale))
    if rest := found.kernels[KERNELS:]:
        launches, us, share = (sum(getattr(r, field) for r in rest) for field in ("launches", "us", "share"))
        table.add_row(f"{len(rest)} more", *_numbers(launches, us, share))
    table.add_row()
    for row in found.sums:
        table.add_row(KINDS[row.kind], *_cells(row, scale))
    table.add_row("gaps inside the step", *_numbers(None, found.gaps_us, found.gaps_us / found.step_us))
    if found.between_us is not None:
        between = found.between_us
        table.add_row("gap to the next step's first kernel", *_numbers(None, between, between / found.step_us))
    if found.between_idle_us is not None:
        idle = found.between_idle_us
        table.add_row("  of it, before that step's inputs", *_numbers(None, idle, idle / found.step_us))
    table.add_row("step, under the profiler", *_numbers(None, found.step_us, 1.0))
    console.print(table)
    host = ", ".join(f"{name} {us:.0f}" for name, us in profile.host_us.items() if name not in ("host", "wait"))
    console.print(f"host: {profile.host_us['host']:.0f} us ({host}); it waits {profile.host_us['wait']:.0f} us")


def _cells(row: Row, scale: float) -> list[str]:
    rates = ["" if rate is None else f"{rate * scale:.3g}" for rate in (row.tb_per_s, row.tflop_per_s)]
    return _numbers(row.launches, row.us, row.share) + rates


def _numbers(launches: float | None, us: float, share: float) -> list[str]:
    return ["" if launches is None else f"{launches:.4g}", f"{us:.1f}", f"{share:.1%}"]
