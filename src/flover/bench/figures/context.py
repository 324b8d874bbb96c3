"""What the figures are measured with: `Bench` makes models and systems, serves jobs, and keeps finished cells.

A cell is one workload on one system and model. It is written when it is done, so that an interrupted run goes on where
it was; figures that need the same cells (4a, 4b, 4c, progress) share them. Cells that the budget has no time for are
left out, and the figure says so. Whatever cannot run here (no memory, an absent package) becomes a `Gap` in the figure,
found before anything is loaded where it is a matter of size.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flover.bench.figures.digests import Data, Extra, Tokens, digest, standstill
from flover.bench.figures.pieces import Budget, Pace, Pieces, Todo, mark
from flover.bench.figures.scale import Bytes, Scale
from flover.bench.figures.servers import MissingError, Servers, logit_gap
from flover.bench.keep import provenance
from flover.bench.records import Job, Run, System
from flover.bench.workload import Interval, fixed, make_jobs
from flover.config import DTYPE_BYTES, EngineConfig
from flover.engine.engine import detect_hardware, survey
from flover.model_config import ModelConfig
from flover.models.loader import weight_bytes
from flover.resolve import resolve

OURS = "fused:move"  # the system that stands for Flover: the paper's buffer reordering
STEP_TOKENS = 512  # budget of a step: 32 prompts of 8 tokens and their decode, at once


class Bench:
    """One run of the figures.

    Args:
        folder: of the output, which gets `pieces/`. places: for the config.json of each model.
        only: names of models to run; none: all of the scale. Of the others, what is stored is shown.
        draws: of each Poisson gap, if not the scale's. budget: seconds, after which no cell is begun.
        outside: systems that are not ours, beside the others in the figures 4 and progress (`systems`).
        say: gets a line before each cell that runs.
    """

    def __init__(
        self,
        scale: Scale,
        seed: int,
        folder: Path,
        places: Path,
        device: str = "auto",
        only: Sequence[str] = (),
        overwrite: bool = False,
        draws: int | None = None,
        budget: float | None = None,
        outside: Sequence[str] = (),
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.scale, self.seed, self.say = scale, seed, say
        self.device = detect_hardware(EngineConfig(device=device).device).device  # which refuses unknown ones
        self.machine = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        self.only, self.draws, self.outside = tuple(only), draws or scale.draws, tuple(outside)
        self.budget, self.planning = Budget(budget), False
        self.todo: list[Todo] = []  # of a planning pass, which runs nothing
        self.unmeasured: list[Data] = []
        self.stood_still: dict[str, tuple[float, float]] = {}  # cells that were used, `digests.standstill`
        made_by = provenance(self.device)
        made_by["machine"] = self.machine
        self.pieces = Pieces(folder / "pieces", {k: made_by[k] for k in ("date", "commit", "machine")}, overwrite)
        self.folder, self._places = folder, places
        self._sizes: dict[str, Bytes] = {}
        self._singles: dict[str, float] = {}
        self._checked: dict[tuple[str, int, int], str | None] = {}
        self.servers = Servers()

    @property
    def identity(self) -> Data:
        """What a stored figure must have been made with to be shown again."""
        settings: Data = {"scale": self.scale.name, "sizes": mark(repr(self.scale), ()), "seed": self.seed}
        settings |= {"device": self.machine, "models": list(self.only), "draws": self.draws}
        return settings | ({"outside": list(self.outside)} if self.outside else {})

    # ---- models ------------------------------------------------------------------------------------------------------

    def has(self, *models: str) -> list[str]:
        """Those of the models that the scale has."""
        return [model for model in models if model in self.scale.shapes]

    def model_folder(self, model: str) -> Path:
        folder = self._places / model
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.scale.shapes[model]), encoding="utf-8")
        return folder

    def bytes_of(self, model: str) -> Bytes:
        """Of a decode step, at true shape or at this scale's."""
        if model not in self._sizes:
            config = ModelConfig.from_dict(self.scale.shapes[model])
            dtype: torch.dtype = getattr(torch, self.scale.dtype)
            weights = weight_bytes(self.model_folder(model), config, dtype)
            self._sizes[model] = Bytes.of(self.scale.shapes[model], DTYPE_BYTES[self.scale.dtype], weights)
        return self._sizes[model]

    def config(self, model: str, rows: int, limit: int) -> EngineConfig:
        """An engine for that many rows and tokens each.

        Raises:
            MissingError: it does not fit this machine, with the plan. Nothing has been loaded.
        """
        config = EngineConfig(
            model=str(self.model_folder(model)),
            load_format="dummy",
            dtype=self.scale.dtype,
            device=self.device,
            max_model_len=limit,
            max_num_seqs=rows,
            max_num_batched_tokens=STEP_TOKENS,
            enable_prefix_caching=False,
            num_threads=self.scale.threads,
        )
        wanted = model, rows, limit
        if wanted not in self._checked:  # once, with nothing loaded: the planning pass comes first
            self._checked[wanted] = _misfit(config)
        if error := self._checked[wanted]:
            raise MissingError(f"{model} with {rows} rows of {limit} tokens: {error}")
        return config

    # ---- jobs --------------------------------------------------------------------------------------------------------

    @property
    def most_ranks(self) -> int:
        """Of a tensor-parallel group that can run here: GPUs, or cores."""
        return torch.cuda.device_count() if self.device == "cuda" else os.cpu_count() or 1

    @property
    def most(self) -> int:
        """Requests of the largest workload of the figures 4, progress and 8."""
        return max(self.scale.requests)

    def jobs(self, model: str, count: int, num_output: int, arrivals: Any = None) -> list[Job]:
        """Job i has the same prompt in every figure, so one serial run is the reference of all."""
        vocab = int(self.scale.shapes[model]["vocab_size"])
        limit = self.scale.num_prompt + num_output
        laws = arrivals or Interval(0), fixed(self.scale.num_prompt), fixed(num_output)
        return make_jobs(*laws, count, vocab, self.seed, limit)

    def reference(self, model: str, num_output: int) -> Data:
        """Serial, all at once: `tokens` of each request, its `service` seconds, and the `single` request's (median).

        Where serial was measured on fewer than `most` requests (`Scale.serial`), the others take the median, too: all
        are of one length.

        Raises:
            MissingError: it cannot run here, or there was no time for it.
        """

        def extra(run: Run) -> Data:
            ends = [record.times[-1] for record in run.records]
            service = [end - start for start, end in zip([0.0, *ends], ends)]
            tokens = [record.token_ids for record in run.records]
            return {"tokens": tokens, "service": service, "single": statistics.median(service)}

        count = self.scale.serial.get(model, self.most)
        jobs = {"all at once": self.jobs(model, count, num_output)}
        found = self.measure("serial", model, "serial", jobs, [], extra, f"{num_output}-tokens", rows=1)
        if not found and not self.planning:
            raise MissingError(f"serial on {model} is not measured: {self._why(model)}")
        pace = self._pace(model)
        guess = num_output * pace.step(self.scale.num_prompt + num_output / 2)
        data: Data = dict(found["all at once"]) if found else {"tokens": [], "service": [], "single": guess}
        data["measured"] = len(data["service"])
        data["service"] += [data["single"]] * max(0, self.most - len(data["service"]))
        if found and num_output == self.scale.num_output:
            self._singles[model] = data["single"]
        return data

    def _pace(self, model: str) -> Pace:
        scale = self.scale
        return Pace(self.bytes_of(model), self.device, self._singles.get(model), scale.num_prompt, scale.num_output)

    # ---- cells -------------------------------------------------------------------------------------------------------

    def measure(
        self,
        group: str,
        model: str,
        system: str,
        workloads: Mapping[str, Sequence[Job]],
        reference: Tokens,
        extra: Extra | None = None,
        label: str = "",
        rows: int | None = None,
        record: bool = False,
    ) -> Data:
        """The digest of each workload on a system, which is loaded once; what there was no time for is not in it.

        Args:
            workloads: the most important first. extra: what is kept beside `digests.digest`.
            label: of the piece, instead of the system's name. rows: of the engine; by default the most requests.
            record: steps name their rows.

        Raises:
            MissingError: it cannot run here.
        """
        piece, rows = f"{group}-{model}-{label or system}", rows or max(map(len, workloads.values()))
        shape = {k: v for k, v in self.scale.shapes[model].items() if k != "model_type"}  # only transformers reads it
        base: Data = {"model": shape, "dtype": self.scale.dtype, "machine": self.machine}
        base |= {"runs": self.scale.runs, "threads": self.scale.threads}
        marks = {cell: base | {"jobs": mark(system, jobs)} for cell, jobs in workloads.items()}
        found = {cell: self.pieces.find(piece, cell, marks[cell]) for cell in workloads}
        todo = [cell for cell, data in found.items() if data is None]
        if todo and (not self.only or model in self.only):
            limit = max(len(job.prompt) + job.num_output for jobs in workloads.values() for job in jobs)
            config = replace(self.config(model, rows, limit), record_timeline=record)
            most = max(workloads.values(), key=len)
            seconds = {cell: self.scale.runs * self._pace(model).seconds(system, workloads[cell]) for cell in todo}
            if self.planning:
                self.todo.append(Todo(piece, "loading", self._pace(model).loading(system)))
                self.todo += [Todo(piece, cell, seconds[cell]) for cell in todo]
            elif server := self._ready(model, system, config, most, min(seconds.values())):
                for cell, run in self._runs(server, piece, workloads, seconds):
                    data = digest(run, workloads[cell], reference)
                    data["agree"]["logit_gap"] = logit_gap(server, workloads[cell], run, reference)
                    data |= extra(run) if extra else {}
                    found[cell] = self.pieces.keep(piece, cell, marks[cell], data)
        missing = [cell for cell, data in found.items() if data is None]
        if missing:
            self.unmeasured.append({"what": f"{piece}: {'; '.join(missing)}", "why": self._why(model)})
        made = {cell: data for cell, data in found.items() if data is not None}
        still = {", ".join(filter(None, (piece, cell))): standstill(data) for cell, data in made.items()}
        self.stood_still |= {cell: spans for cell, spans in still.items() if spans}
        return made

    def _why(self, model: str) -> str:
        if self.only and model not in self.only:
            return f"{model} was not asked for"
        return "not measured: the budget has no time for it; the same command goes on"

    def _ready(
        self, model: str, system: str, config: EngineConfig, jobs: Sequence[Job], shortest: float
    ) -> System | None:
        """The system, compiled; None: there is no time for it and its shortest cell."""
        loading = 0.0 if self.servers.has(system, config) else self._pace(model).loading(system)
        if not self.budget.holds(loading + shortest):
            return None
        try:
            return self.servers.get(system, config, jobs)
        except MissingError as error:
            raise MissingError(f"{system} on {model}: {error}") from None

    def _runs(
        self, server: System, piece: str, workloads: Mapping[str, Sequence[Job]], seconds: Mapping[str, float]
    ) -> Iterator[tuple[str, Run]]:
        """The cells that there is time for, in their order; each the fastest of as many runs as the scale asks for.

        What others on the machine take is no property of a system.
        """
        slower = 1.0  # than expected
        for cell, expected in seconds.items():
            if not self.budget.holds(expected * slower):
                continue
            self.say(f"{', '.join(filter(None, (piece, cell)))}: about {expected * slower:.0f} s")
            runs = [server.run(workloads[cell]) for _ in range(self.scale.runs)]
            for run in runs:
                errors = [record.error for record in run.records if record.error]
                if errors:
                    raise MissingError(f"{piece}, {cell}: {len(errors)} failed: {errors[0]}")
            slower = max(slower, sum(run.duration for run in runs) / expected) if expected > 1 else slower
            yield cell, min(runs, key=lambda run: run.duration)


def _misfit(config: EngineConfig) -> str | None:
    """Why an engine does not fit this machine with room for every row at its longest."""
    try:
        _, shape, hardware, weights = survey(config)
        resolve(replace(config, kv_layout="slab"), shape, hardware, weights)
    except ValueError as error:
        return str(error)
    return None
