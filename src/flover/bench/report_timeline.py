"""A recorded timeline as the report's page draws it: ids by number, a letter per cell, one line per request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flover.metrics import PALETTE

PHASES = {"p": "prefill", "d": "decode", "x": "dead", "-": "no token"}


@dataclass(slots=True)
class TimelineView:
    """Rows over steps: `data` for the page's script, `requests` for the table beside it."""

    name: str
    num_steps: int
    num_rows: int
    num_moves: int
    data: dict[str, Any]
    requests: list[list[Any]]  # id, first step, row, prefill tokens, decode tokens, dead steps, last step, end

    @classmethod
    def of(cls, name: str, steps: Sequence[Mapping[str, Any]]) -> TimelineView:
        """From the steps of `Timeline.to_json`; ValueError if there are none."""
        if not steps:
            raise ValueError("no steps")
        numbers: dict[str, int] = {}
        requests: list[list[Any]] = []

        def number(request_id: str, row: int, step: int) -> int:
            if request_id not in numbers:
                numbers[request_id] = len(requests)
                requests.append([request_id, step, row, 0, 0, 0, step, ""])
            return numbers[request_id]

        drawn = []
        for step in steps:
            at = int(step["step"])
            ids = [number(str(request_id), row, at) for row, request_id in enumerate(step["rows"])]
            phases = "".join(
                "x" if dead else "-" if not tokens else "p" if prefilling else "d"
                for tokens, prefilling, dead in zip(step["num_scheduled"], step["prefilling"], step["dead"])
            )
            for i, phase, tokens in zip(ids, phases, step["num_scheduled"]):
                requests[i][6] = at
                if phase in "pd":
                    requests[i][3 if phase == "p" else 4] += tokens
                requests[i][5] += phase == "x"
            leaves = [[row, number(str(name), row, at), str(reason)] for row, name, reason in step["leaves"]]
            for _, i, reason in leaves:
                requests[i][7] = reason
            drawn.append(
                {
                    "step": at,
                    "ms": round((step["end"] - step["start"]) * 1e3, 3),
                    "ids": ids,
                    "tokens": list(step["num_scheduled"]),
                    "phases": phases,
                    "joins": [[row, number(str(name), row, at)] for row, name, _ in step["joins"]],
                    "leaves": leaves,
                    "moves": [[src, dst] for src, dst in step["relocations"]],
                    "kv": [step.get("kv_used_bytes", 0), step.get("kv_reserved_bytes", 0)],
                }
            )
        data = {"names": list(numbers), "steps": drawn, "palette": PALETTE, "phases": PHASES}
        num_rows = max((len(step["ids"]) for step in drawn), default=0)
        return cls(name, len(drawn), num_rows, sum(len(s["moves"]) for s in drawn), data, requests)
