"""The anatomy of a step: a profiler's events told kernel by kernel, the gaps inside steps, and those between them.

Pure Python: `anatomy` takes intervals and gives numbers, whoever recorded them. Kernels overlap (programmatic dependent
launch starts one while the one before still runs), so a kernel's *own* time is what it adds to the busy time: from
where everything before it has ended. Own times and gaps add up to the step; elapsed times do not.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PRODUCT, ATTENTION, TRANSFER, OTHER = "product", "attention", "transfer", "other"
STAGING = "Memcpy HtoD"  # a step on a GPU begins with the copy of its inputs, and has no other
_TRANSFERS = re.compile(r"Memcpy (HtoD|DtoH)")
_ATTENTION = re.compile(r"flash|fmha|attention|bmm|scaled_dot|^_?(decode|prefill)$")
_PRODUCTS = re.compile(
    r"gemm|gemv|nvjet|cutlass|cublas|splitk|(^|_)linear|_one_row|scaled_mm|::(addmm|mm|addmv|mv|_int_mm)$", re.I
)


class Event(NamedTuple):
    """An interval of the device, microseconds on one clock; launches 0: the rest of an op that another interrupted."""

    name: str
    start: float
    end: float
    launches: int = 1


class Work(NamedTuple):
    """What something must do: bytes to read, floating-point operations."""

    bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class Row:
    """A kernel, or the sum of a kind of kernels; launches and microseconds are those of one step.

    us: own time; elapsed_us: from start to end, waits for the kernel before included. share: of the step.
    The rates are of own time and None where the work is not known.
    """

    name: str
    kind: str
    launches: float
    us: float
    elapsed_us: float
    share: float
    tb_per_s: float | None = None
    tflop_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Means over `steps` steps, microseconds: step = span + between, span = busy + gaps.

    Args:
        span_us: first kernel's start to last kernel's end.
        between_us: last kernel's end to the next step's first kernel; its median, and the part before the next step's
            first activity (the staging copy). None where steps could not be told apart: the span is then everything.
        kernels: by own time, the largest first. sums: the same by kind.
    """

    steps: int
    step_us: float
    span_us: float
    busy_us: float
    gaps_us: float
    between_us: float | None
    between_median_us: float | None
    between_idle_us: float | None
    kernels: tuple[Row, ...]
    sums: tuple[Row, ...]


def kind_of(name: str) -> str:
    """Transfer (between host and device), attention, matrix product or other, by a kernel's or op's name."""
    for kind, pattern in ((TRANSFER, _TRANSFERS), (ATTENTION, _ATTENTION), (PRODUCT, _PRODUCTS)):
        if pattern.search(name):
            return kind
    return OTHER


def anatomy(
    events: Iterable[Event],
    starts: Sequence[float],
    steps: int,
    products: Sequence[Work] = (),
    attention: Work | None = None,
) -> Anatomy:
    """The anatomy of `steps` steps.

    Args:
        events: what the device did. starts: when each step's first activity began; of another number than `steps`,
            they mark something else and all events are taken as one stretch.
        products: the matrix products of a step in launch order; where a step has another number of them, only their
            sum has a rate. attention: of a step, all layers.

    Raises:
        ValueError: no event.
    """
    ordered = sorted(events, key=lambda e: e.start)
    kernels = [e for e in ordered if kind_of(e.name) != TRANSFER]
    if not kernels:
        raise ValueError("the profiler recorded no kernel")
    parts = _split(kernels, starts) if len(starts) == steps else [kernels]
    if not all(parts):
        parts = [kernels]  # a step without kernels: these were not steps
    own: defaultdict[str, float] = defaultdict(float)
    elapsed: defaultdict[str, float] = defaultdict(float)
    launches: defaultdict[str, int] = defaultdict(int)
    for event in ordered:
        elapsed[event.name] += event.end - event.start
        launches[event.name] += event.launches
        if kind_of(event.name) == TRANSFER:
            own[event.name] += event.end - event.start
    ends, busy = [], 0.0
    for part in parts:
        end = part[0].start
        for event in part:
            added = max(0.0, event.end - max(end, event.start))
            own[event.name] += added
            busy += added
            end = max(end, event.end)
        ends.append(end)
    span = sum(end - part[0].start for end, part in zip(ends, parts))
    between, idle = [], []
    for end, part, start in zip(ends, parts[1:], starts[1:]):
        between.append(part[0].start - end)
        idle.append(start - end)
    mean_between = statistics.fmean(between) if between else None
    step = span / steps + (mean_between or 0.0)
    known = _by_name(parts, products, steps)
    attending = {name for name in own if kind_of(name) == ATTENTION}
    if attention is not None and len(attending) == 1:
        known[attending.pop()] = attention
    rows = [
        _row(name, kind_of(name), (launches[name], own[name], elapsed[name]), steps, step, known.get(name))
        for name in sorted(own, key=lambda name: -own[name])
    ]
    total = Work(sum(w.bytes for w in products), sum(w.flops for w in products)) if products else None
    return Anatomy(
        steps=steps,
        step_us=step,
        span_us=span / steps,
        busy_us=busy / steps,
        gaps_us=(span - busy) / steps,
        between_us=mean_between,
        between_median_us=statistics.median(between) if between else None,
        between_idle_us=statistics.fmean(idle) if idle else None,
        kernels=tuple(rows),
        sums=_sums(rows, step, {PRODUCT: total, ATTENTION: attention}),
    )


def _split(kernels: Sequence[Event], starts: Sequence[float]) -> list[list[Event]]:
    """Kernels by step; what began before the first step belongs to none."""
    parts: list[list[Event]] = [[] for _ in starts]
    bounds = [*starts[1:], float("inf")]
    i = 0
    for event in kernels:
        while event.start >= bounds[i]:
            i += 1
        if event.start >= starts[0]:
            parts[i].append(event)
    return parts


def _by_name(parts: Sequence[Sequence[Event]], products: Sequence[Work], steps: int) -> dict[str, Work]:
    """Work of a step by kernel name, if every step launches exactly the products that are known, in their order."""
    if not products or len(parts) != steps:
        return {}
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for part in parts:
        names = [e.name for e in part if e.launches and kind_of(e.name) == PRODUCT and "reduce" not in e.name.lower()]
        if len(names) != len(products):
            return {}
        for name, work in zip(names, products):
            sums[name][0] += work.bytes / steps
            sums[name][1] += work.flops / steps
    return {name: Work(*work) for name, work in sums.items()}


def _row(name: str, kind: str, totals: Sequence[float], steps: int, step: float, work: Work | None) -> Row:
    """totals: launches, own and elapsed microseconds of all steps."""
    launches, us, elapsed = (total / steps for total in totals)
    rates = (work.bytes / us / 1e6, work.flops / us / 1e6) if work is not None and us > 0 else (None, None)
    return Row(name, kind, launches, us, elapsed, us / step if step else 0.0, *rates)


def _sums(rows: Sequence[Row], step: float, known: Mapping[str, Work | None]) -> tuple[Row, ...]:
    sums = []
    for kind in (PRODUCT, ATTENTION, OTHER, TRANSFER):
        mine = [(row.launches, row.us, row.elapsed_us) for row in rows if row.kind == kind]
        if mine:
            sums.append(_row(kind, kind, [sum(each) for each in zip(*mine)], 1, step, known.get(kind)))
    return tuple(sums)


def exclusive(events: Iterable[Event]) -> list[Event]:
    """Nested intervals of one thread as intervals that do not overlap: each moment belongs to the innermost."""
    out: list[Event] = []
    stack: list[Event] = []  # what remains of each open interval; launches: whether it has yet to be counted

    def emit(end: float) -> None:
        top = stack[-1]
        if end > top.start or top.launches:
            out.append(top._replace(end=max(end, top.start)))

    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        while stack and stack[-1].end <= event.start:
            _close(stack, emit)
        if stack:
            emit(event.start)
            stack[-1] = stack[-1]._replace(start=event.start, launches=0)
        stack.append(event)
    while stack:
        _close(stack, emit)
    return out


def _close(stack: list[Event], emit: Callable[[float], None]) -> None:
    """The innermost interval ends; the one around it goes on from there."""
    emit(stack[-1].end)
    end = stack.pop().end
    if stack:
        stack[-1] = stack[-1]._replace(start=end)


def short_name(name: str, width: int) -> str:
    """A kernel's name for people: no namespaces, templates or arguments, but the functors that tell two apart."""
    text = re.sub(r"\(anonymous namespace\)::|^void ", "", name.replace("<unnamed>::", ""))
    functors = re.findall(r"(\w*[Ff]unctor\w*|\w+_kernel_cuda)", text[len(text.split("<")[0]) :])
    if "<" in text or ("(" in text and not text.startswith("Mem")):
        text = re.split(r"[<(]", text)[0].rsplit("::", 1)[-1]
        if functors:
            text += f" {functors[0]}"
    if len(text) > width:
        head = (width - 1) * 2 // 3
        text = f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"
    return text
