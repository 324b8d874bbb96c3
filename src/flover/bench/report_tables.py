"""The tables in a figure's JSON, found by shape, and which of their columns make a chart.

A table is a list of flat objects, equally long columns, or curves (lists of points) by name, wherever it lies. Its
first columns, up to where they tell all rows apart, are its key; what follows is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SERIES = ("system", "policy", "mode", "reorder", "plan", "layout")  # key columns that name the lines of a chart
PLAIN = ("tokens",)  # rows of these names are not drawn
UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "x": "ratio"}
MAX_ROWS = 2000  # of a table; of a longer one every k-th row
MAX_LINES = 8


@dataclass(slots=True)
class Chart:
    """Columns by index. `ys`: choices of what to show, a name and (label, column) of each line."""

    x: int
    ys: list[tuple[str, list[tuple[str, int]]]]
    series: int | None  # one line for each value
    filters: list[int]  # one value is shown at a time
    bars: bool
    curve: bool = False  # of points in order; else several values at an x are repeats


@dataclass(slots=True)
class Table:
    """`every` > 1 where rows were left out; no chart where there is nothing to draw."""

    name: str
    columns: list[str]
    rows: list[list[Any]]
    every: int = 1
    chart: Chart | None = None


def is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def tables_of(name: str, value: Any, point: Sequence[str] = ("x", "y")) -> Iterator[Table]:
    """Every table in a value; loose values beside them are one of names and values. point: columns of a curve."""
    if is_rows(value):
        names = list(dict.fromkeys(key for row in value for key in row))
        flat = [key for key in names if not any(isinstance(row.get(key), dict | list) for row in value)]
        yield _table(name, flat, [[row.get(key) for key in flat] for row in value], name not in PLAIN)
    elif isinstance(value, dict) and value:
        lists = [inner for inner in value.values() if isinstance(inner, list) and inner]
        if depth := next((d for d in (1, 2) if _are_curves(value, d, len(point))), 0):
            table = _table(name, [*("system", "curve")[-depth:], *point], list(_points(value)))
            if table.chart:
                table.chart.curve = True
            yield table
        elif len(lists) == len(value) and len({len(column) for column in lists}) == 1 and _is_flat(lists):
            yield _table(name, list(value), [list(row) for row in zip(*lists)])
        else:
            loose = [[key, inner] for key, inner in value.items() if not isinstance(inner, dict | list)]
            if loose:
                yield Table(name, ["what", "value"], loose)
            for key, inner in value.items():
                yield from tables_of(f"{name} {'' if key == 'rows' else key}".strip(), inner, point)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_curves(value: Any, depth: int, width: int) -> bool:
    """Lists of points of that many numbers, by `depth` names."""
    if depth:
        return isinstance(value, dict) and all(_are_curves(inner, depth - 1, width) for inner in value.values())
    return isinstance(value, list) and all(
        isinstance(point, list) and len(point) == width and all(map(_is_number, point)) for point in value
    )


def _points(value: Any, names: tuple[str, ...] = ()) -> Iterator[list[Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _points(inner, (*names, name))
    else:
        yield from ([*names, *point] for point in value)


def _is_flat(columns: Sequence[Sequence[Any]]) -> bool:
    return not any(isinstance(item, dict | list) for column in columns for item in column)


def _table(name: str, columns: list[str], rows: list[list[Any]], drawn: bool = True) -> Table:
    every = -(-len(rows) // MAX_ROWS)
    return Table(name, columns, rows[::every], every, _chart(columns, rows) if drawn else None)


def _key(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[int]:
    """The first columns up to where they tell the rows apart, less those that are the same everywhere."""
    for width in range(1, len(columns)):
        if len({tuple(row[:width]) for row in rows}) == len(rows):
            break
    else:  # repeats, whose mean is drawn: words and the first number tell them apart
        width = next((i + 1 for i in range(len(columns) - 1) if all(_is_number(row[i]) for row in rows)), 1)
    return [i for i in range(width) if len({row[i] for row in rows}) > 1]


def _chart(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Chart | None:
    if len(rows) < 2 or len(columns) < 2:
        return None
    values = [[row[i] for row in rows if row[i] is not None] for i in range(len(columns))]
    numbers = [i for i, column in enumerate(values) if column and all(map(_is_number, column))]
    keys = _key(columns, rows)
    kinds = {i: len(set(values[i])) for i in keys}
    if not keys:
        return None
    # the axis: numbers before words, then whatever has the most values, the last of equals
    x = max(keys, key=lambda i: (i in numbers, kinds[i], i))
    others = [i for i in keys if i != x]
    measured = [i for i in numbers if i > max(keys)]
    if not measured:
        return None
    ys = _choices(columns, measured)
    lines = next((i for i in others if columns[i] in SERIES), None)
    if lines is None and not any(len(group) > 1 for _, group in ys):
        lines = next((i for i in reversed(others) if kinds[i] <= MAX_LINES), None)
    ys.sort(key=lambda choice: all(_restates(rows, keys, i) for _, i in choice[1]))
    if lines is not None and any(kinds[lines] * len(group) > MAX_LINES for _, group in ys):
        ys = [(columns[i], [(columns[i], i)]) for i in measured]
    return Chart(x, ys, lines, [i for i in others if i != lines], x not in numbers)


def _restates(rows: Sequence[Sequence[Any]], keys: Sequence[int], y: int) -> bool:
    """y says no more than one key does: an interval in another unit. Of little interest."""
    for key in keys:
        values = {(row[key], row[y]) for row in rows}
        if len(values) == len({row[key] for row in rows}) < len(rows):
            return True
        if all(_is_number(a) and _is_number(b) and a for a, b in values) and len(values) > 2:
            ratios = [b / a for a, b in values]
            if max(ratios) - min(ratios) <= 1e-9 * abs(max(ratios)):
                return True
    return False


def _choices(columns: Sequence[str], measured: Sequence[int]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Columns shown together: those that end alike (fused_s, serial_s), else those that begin alike (x_over_best)."""
    groups: dict[str, list[tuple[str, int]]] = {}
    ends = [columns[i].partition("_")[2] or columns[i] for i in measured]
    starts = [columns[i].rpartition("_")[0] for i, end in zip(measured, ends) if ends.count(end) == 1]
    for i, end in zip(measured, ends):
        start = columns[i].rpartition("_")[0]
        if ends.count(end) > 1:
            groups.setdefault(end, []).append((columns[i].removesuffix(f"_{end}"), i))
        elif start and starts.count(start) > 1:
            groups.setdefault(start, []).append((columns[i].removeprefix(f"{start}_"), i))
        else:
            groups.setdefault(columns[i], []).append((columns[i], i))
    return [(UNITS.get(name, name), lines) for name, lines in groups.items()]
