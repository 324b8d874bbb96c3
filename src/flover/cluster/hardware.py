"""Accelerators as `flover plan --hardware` knows them: datasheet rates, link speeds, and what a step reaches of them.

Rates and sizes are NVIDIA's datasheets' (dense tensor FLOP/s, one direction of a link). `Efficiency` is measured: see
`benchmarks/scaling.py`, which fits it to Llama-3-8B and GPT-2 XL on one H200 and reports what is left there and on
models that it has not seen. For every other card it is an assumption. No torch.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from flover.show import show


def _check(part: Any, *names: str, zero: bool = False) -> None:
    for name in names:
        _check_number(name, getattr(part, name), zero)


def _check_number(name: str, value: Any, zero: bool = False) -> None:
    """ValueError unless it is a finite number above 0, or `zero` itself where that makes sense."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max
    if not number or (value == 0 and not zero):
        raise ValueError(f"{name} must be a number {'of at least' if zero else 'above'} 0, got {show(value)}")


@dataclass(frozen=True, slots=True)
class Link:
    """latency: seconds of a small all-reduce of two. hop: seconds that each further rank adds. bandwidth: bytes/s of
    one device, one direction.
    """

    latency: float
    hop: float
    bandwidth: float

    def __post_init__(self) -> None:
        _check(self, "latency", "hop", zero=True)
        _check(self, "bandwidth")


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What a step reaches of the datasheet, fitted to Llama-3-8B and GPT-2 XL on one H200 (see the module).

    Args:
        weights, kv: share of the memory bandwidth when weights, and keys and values, are read.
        flops: share of the tensor FLOP/s in large products.
        softness: exponent p of (t_bytes^p + t_flops^p)^(1/p): a product bound by neither takes longer than either.
        layer: seconds a layer costs beside them (norms, rotation, launches). row: seconds a row adds to a step.
        step: seconds of a step that do not depend on the model (sampling, transfers).
        eight_bit: what products of fp8 or int8 reach of the shares above, as tokens are quantised on the way.
        link: share of a link's bandwidth in an all-reduce: NCCL itself counts on 360 of an H100's 450 GB/s.
    """

    weights: float = 0.876
    kv: float = 0.90
    flops: float = 0.689
    softness: float = 1.64
    layer: float = 18.3e-6
    row: float = 1.40e-6
    step: float = 50e-6
    eight_bit: float = 0.736
    link: float = 0.8

    def __post_init__(self) -> None:
        shares = ("weights", "kv", "flops", "eight_bit", "link")
        _check(self, *shares, "softness")
        _check(self, "layer", "row", "step", zero=True)
        for name in shares:
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator and how it is wired. flops: dense FLOP/s by dtype of the products."""

    name: str
    memory_bytes: float
    bandwidth: float
    flops: Mapping[str, float]
    per_node: int
    node: Link
    network: Link
    efficiency: Efficiency = field(default_factory=Efficiency)

    def __post_init__(self) -> None:
        _check(self, "memory_bytes", "bandwidth", "per_node")
        for dtype, rate in self.flops.items():
            _check_number(f"flops {dtype}", rate)

    def rate(self, dtype: str) -> float:
        """FLOP/s of products in a dtype; ValueError if the card has none."""
        if dtype not in self.flops:
            raise ValueError(f"{self.name} has no {dtype} products here; it has {', '.join(self.flops)}")
        return self.flops[dtype]


# Small all-reduces: on two H200s 2.1 us in one shot (benchmarks/results/gpu_tp.json), on two A100s 10 us and 4 us for
# each further one (NVIDIA/nccl-tests issue 123); 2 us a further H200 and all of InfiniBand's latency are assumed. A GPU
# has 400 Gb/s of NDR, 200 of HDR.
_NVLINK4, _NVLINK3 = Link(2.1e-6, 2e-6, 450e9), Link(10e-6, 4e-6, 300e9)
_NDR, _HDR = Link(20e-6, 2e-6, 50e9), Link(20e-6, 2e-6, 25e9)
_HOPPER = {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "fp8": 1979e12, "int8": 1979e12}
_AMPERE = {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12, "int8": 624e12}
DEVICES = {
    "h200": Device("h200", 141e9, 4.8e12, _HOPPER, 8, _NVLINK4, _NDR),  # H200 SXM datasheet
    "h100": Device("h100", 80e9, 3.35e12, _HOPPER, 8, _NVLINK4, _NDR),  # H100 SXM datasheet
    "a100": Device("a100", 80e9, 2.039e12, _AMPERE, 8, _NVLINK3, _HDR),  # A100 80GB SXM datasheet
}


def device(name: str) -> Device:
    """A card by name, or one described by a .toml or .json file; ValueError says what is wrong with it."""
    if name in DEVICES:
        return DEVICES[name]
    path = Path(name)
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"hardware must be {', '.join(DEVICES)} or a .toml or .json file, got {name!r}")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else _toml(text)
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name}: a card is an object of values, not {show(values)}")
    parts = {"node": Link, "network": Link, "efficiency": Efficiency}
    for part, kind in parts.items():
        if part in values:
            values[part] = _make(kind, values[part], f"{name}: [{part}]")
    if not isinstance(values.get("flops"), dict):
        raise ValueError(f"{name}: flops must be a table of FLOP/s by dtype, such as bfloat16 = 989e12")
    return _make(Device, {"name": path.stem, **values}, name)  # type: ignore[no-any-return]


def _toml(text: str) -> dict[str, Any]:
    try:
        reader = importlib.import_module("tomllib")  # Python 3.11
    except ModuleNotFoundError:
        raise ValueError("TOML needs Python 3.11; a .json file of the same values works") from None
    return reader.loads(text)  # type: ignore[no-any-return]


def _make(kind: Any, values: Any, where: str) -> Any:
    known = [f.name for f in fields(kind)]
    if not isinstance(values, dict) or not set(values) <= set(known):
        wrong = sorted(set(values) - set(known)) if isinstance(values, dict) else values
        raise ValueError(f"{where}: unknown {wrong}; known are {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).partition('() ')[2]}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
