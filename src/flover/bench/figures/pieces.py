"""Finished cells, a file for each system on a model, and how long the cells to come will take.

A cell is one workload on one system; it is written when it is done, so that a run that is killed loses the cell it was
at. It is used again by whoever asks for the same jobs on the same system, model, device and settings.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flover.bench.figures.digests import Data
from flover.bench.figures.scale import Bytes
from flover.bench.figures.theory import queue_ends, simulate
from flover.bench.keep import write_json
from flover.bench.records import Job
from flover.bench.systems import parse_dynamic

GUESS = {"cuda": (3e12, 0.0, 15.0), "cpu": (5e9, 2e-3, 0.5)}  # bytes/s, seconds of an empty step, of loading a model
CAPTURE_SECONDS = 0.7  # of an instance


def mark(system: str, jobs: Sequence[Job]) -> str:
    """Of a cell: what is run, to the microsecond."""
    text = [(round(job.arrival, 6), job.prompt, job.num_output) for job in jobs]
    return hashlib.sha256(repr((system, text)).encode()).hexdigest()[:16]


class Pieces:
    """Args: folder: made at the first cell. made_by: date, commit, machine, noted with each. overwrite: forget all."""

    def __init__(self, folder: Path, made_by: Data, overwrite: bool) -> None:
        self._folder, self._made_by, self._overwrite = folder, made_by, overwrite
        self._made: set[tuple[str, str]] = set()  # in this run
        self._read: dict[str, Data] = {}
        self.commits: set[str | None] = set()  # whose cells were asked for

    def _path(self, piece: str) -> Path:
        return self._folder / f"{piece.replace(':', '-').replace('/', '-')}.json"

    def _cells(self, piece: str) -> Data:
        if piece not in self._read:
            try:
                stored = json.loads(self._path(piece).read_text(encoding="utf-8"))
                self._read[piece] = dict(stored["cells"])
            except (OSError, ValueError, LookupError, TypeError):
                self._read[piece] = {}
        return self._read[piece]

    def find(self, piece: str, cell: str, identity: Data) -> Data | None:
        """The data of a cell that was made with the same identity."""
        stored = self._cells(piece).get(cell)
        if stored is None or stored["identity"] != identity or (self._overwrite and (piece, cell) not in self._made):
            return None
        self.commits.add(stored["made_by"]["commit"])
        return dict(stored["data"])

    def keep(self, piece: str, cell: str, identity: Data, data: Data) -> Data:
        """Store a cell; -> as a later run will read it."""
        cells = self._cells(piece)
        normal: Data = json.loads(json.dumps(data))
        cells[cell] = {"identity": identity, "made_by": self._made_by, "data": normal}
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(piece), {"piece": piece, "cells": cells}, indent=None)
        self._made.add((piece, cell))
        self.commits.add(self._made_by["commit"])
        return dict(normal)


class Budget:
    """Wall-clock seconds from now on; None: no end."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def holds(self, seconds: float) -> bool:
        return self._end is None or time.monotonic() + seconds <= self._end


class Todo(NamedTuple):
    """A cell that is not there yet, or the loading before the first of its piece, and the seconds it should take."""

    piece: str
    cell: str
    seconds: float


class Pace(NamedTuple):
    """What a model's steps should take: `single`: seconds of a request alone, measured, else guessed from bytes."""

    size: Bytes
    device: str
    single: float | None
    num_prompt: int
    num_output: int

    def step(self, tokens: float) -> float:
        speed, least, _ = GUESS[self.device]
        if self.single is None:
            return least + self.size.step(tokens) / speed
        return self.single * self.size.step(tokens) / self.size.request(self.num_prompt, self.num_output)

    def seconds(self, system: str, jobs: Sequence[Job]) -> float:
        """Of a run. A foreign engine is taken to be as slow as serial."""
        kind, _, detail = system.partition(":")
        if kind == "fused":
            return simulate(jobs, lambda rows, held: self.step(held) if rows else 0.0).seconds
        if kind == "dynamic":  # the first batch, and one of all that came meanwhile
            waits = jobs[-1].arrival + parse_dynamic(detail)[0]
            return waits + 2 * self.seconds("fused", [job._replace(arrival=0.0) for job in jobs])
        each = [job.num_output * self.step(len(job.prompt) + job.num_output / 2) for job in jobs]
        return queue_ends([job.arrival for job in jobs], each)[-1]

    def loading(self, system: str) -> float:
        """Seconds until a system is ready."""
        kind, _, detail = system.partition(":")
        one = GUESS[self.device][2] + self.size.weights / 1e10
        if kind == "concurrent-processes":  # one after the other, each also starts Python
            return int(detail or 8) * one
        instances = int(detail or 32) if kind == "concurrent" and self.device == "cuda" else 0
        return one + CAPTURE_SECONDS * instances
